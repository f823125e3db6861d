"""The compiled decoder: stands in for the forward of a model without its head where one sequence goes on, by a token or
by many, and leaves everything else to the modules.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from greenroom import environment
from greenroom.decode import kv, proof
from greenroom.decode.describe import DecoderParts, NotUnderstoodError, Turn, describe
from greenroom.decode.prompt import Prompt
from greenroom.hooks import Hooks
from greenroom.kernels import native
from greenroom.prompts import OUTPUTS
from greenroom.static_kv import lasting
from greenroom.threads import count, lent_to_torch

_INPUTS = {"attention_mask", "past_key_values", "position_ids", "inputs_embeds", "use_cache", "return_dict"}
"""Arguments that a step understands, or need not."""


_FEW = 16
"""Tokens that are not worth torch's threads, which wait for each other at every operation."""


class ServeToken(Protocol):
    """Computes one token's experts."""

    def __call__(
        self,
        layer: int,
        module: Any,
        x: torch.Tensor,
        experts: "list[int]",
        weights: "list[float]",
        outputs: torch.Tensor,
        meanwhile: "Callable[[], None]",
        shares: "Callable[[], list[float]]",
        foresee: "Callable[[int, int], list[int]] | None",
    ) -> None:
        """Put each expert's output for x [1, H], unweighted, into its row of outputs [k, H]; `experts` are ascending.
        `meanwhile` is called once, when what is missing is on its way. `shares` tells what the router thinks of all
        experts (see `prefetch.Router.shares`); `foresee` gives what a later MoE layer would choose first if nothing
        were added until there, up to so many experts, likeliest first (none of a layer that has no router); None where
        `Residents.lacks` has been told."""
        ...


Passed = tuple[int, list[int], list[float], list[float] | None]
"""(MoE layer, experts, weights, what the router thinks of all where `wants_shares`) of a token that passed it"""


class Residents(Protocol):
    """Knows where experts lie, so that a token passes layers at once where all that it wants is there."""

    @property
    def wants_shares(self) -> bool:
        """Whether `walked` is to be told what routers think."""
        ...

    def there(self, modules: "Sequence[Any]") -> "tuple[Any, int, tuple[int, int]]":
        """`native.all_records` for the experts `modules` of a decoder's layers, None where there are none; how many
        layers may be passed before this is asked again, 0 while they have to be served one by one; and what is
        foreseen meanwhile, MoE layers ahead and experts of each."""
        ...

    def lacks(
        self,
        layer: int,
        experts: "list[int]",
        foreseen: "list[tuple[int, list[int]]]",
        passed: "Callable[[], list[Passed]]",
    ) -> bool:
        """A token wants `experts` of a MoE layer, and not all of them are there, or of those that are `foreseen` (layer
        ahead, experts likeliest first). Whether it may go on, since all `experts` are there now. `passed` tells of the
        layers before, of which `walked` will not be told then."""
        ...

    def walked(self, passed: "list[Passed]", compute_s: float, foresee_s: float) -> None:
        """What was chosen in layers that a token has passed, the time in experts, and that in which a layer foresaw
        others."""
        ...


class DecodeStep:
    """`base.forward` with a fast way for the next tokens of one sequence.

    `reason` says why the fast way is not taken, in words; empty while it is. It is described and proved when asked, or
    at the first token that could take it. `rough`: see `kernels.native.experts`; here for a prompt's projections.
    `kv_bits`: of cached keys and values, 16 or 8.
    """

    _serve: ServeToken
    _residents: "Residents | None" = None

    def __init__(self, base: Any, rough: bool = False, kv_bits: int = 16) -> None:
        self._base, self._rough, self._kv_bits = base, rough, kv_bits
        self._modules_forward = base.forward
        self._hooks = Hooks(base)
        self._parts: DecoderParts | None = None
        self._decoder: Any = None
        self.enabled = environment.decode() != "modules"  # without the extension `reason` says so
        """set to False, every token goes through the modules"""
        self.steps = 0
        """single tokens that went the fast way"""
        self.walks = 0
        """calls in which those passed layers at once"""
        self.prompts = 0
        """calls of several that did"""
        self.forget()
        base.forward = self.forward

    def served_by(self, serve: ServeToken, residents: "Residents | None" = None) -> None:
        """Who computes experts from now on; to be told before the first token."""
        self._serve, self._residents = serve, residents

    @staticmethod
    def may_serve() -> bool:
        """Whether there is a compiled step at all, for models that it understands, and nobody switched it off."""
        return native.extension() is not None and environment.decode() != "modules"

    def __str__(self) -> str:
        """For people: what decodes single tokens."""
        if not self.enabled:
            return "transformers' modules, as asked for"
        if self._hooks:
            return "transformers' modules (somebody hooked them)"
        return f"transformers' modules ({self.reason})" if self.reason else "compiled"

    def forget(self) -> None:
        """Describe and prove anew at the next token."""
        self.reason, self._tried = "", False
        self._hooks.renew()

    def forward(self, input_ids: "torch.Tensor | None" = None, *rest: Any, **others: Any) -> Any:
        """As the model's own forward."""
        if rest:
            return self._modules_forward(input_ids, *rest, **others)
        if self.enabled and input_ids is not None and input_ids.shape[:-1] == (1,) and self._takes(others):
            if others.get("past_key_values") is None and self._caches(others.get("use_cache")):
                others["past_key_values"] = DynamicCache(config=self._base.config)  # the modules' way goes on with it
            way = self._step if input_ids.shape[1] == 1 else self._prompt
            out = way(input_ids, **others)
            if out is not None:
                return out
        given = input_ids if input_ids is not None else others.get("inputs_embeds")
        many = given is None or given.shape[0] * given.shape[1] > _FEW
        with lent_to_torch() if many else contextlib.nullcontext():
            return self._modules_forward(input_ids=input_ids, **others)

    def _takes(self, others: "dict[str, Any]") -> bool:
        """Whether a call asks for nothing but more tokens."""
        if not others.keys() <= _INPUTS | OUTPUTS or any(others.get(name) for name in OUTPUTS):
            return False
        if others.get("inputs_embeds") is not None or torch.is_grad_enabled():
            return False
        config = self._base.config
        if (
            config.output_hidden_states
            or getattr(config, "output_attentions", False)
            or others.get("return_dict") is False
        ):
            return False
        if self._base.training or self._hooks:  # hooks see the modules' own way
            return False
        return not self.prove()

    def _caches(self, use_cache: "bool | None") -> bool:
        """Whether somebody who brings no cache wants one."""
        return bool(getattr(self._base.config, "use_cache", False) if use_cache is None else use_cache)

    def prove(self) -> str:
        """Describe the decoder and compare it with its modules, unless that is done; gives `reason`."""
        if not self._tried:
            self.reason = self._why_not()
            self._tried = True  # not before: an interrupted proof proves nothing
            if self.reason:
                self._parts = self._decoder = None  # with the weights that it holds once more
        return self.reason

    def _why_not(self) -> str:
        try:
            self._parts = parts = describe(self._base)
            with lasting():
                self._hidden = torch.zeros(1, parts.width, dtype=torch.float32, device="cpu")
                self._normed = torch.zeros_like(self._hidden)
                self._outputs = self._hidden.new_empty(parts.top_k, parts.width)
            self._decoder = native.decoder(parts.described, self._hidden, self._normed)
            self._places = {moe.greenroom_layer: place for place, moe in enumerate(parts.moe) if moe is not None}
            return proof.disagreement(self, self._base, parts)
        except NotUnderstoodError as error:
            return str(error)
        except Exception as error:  # modelling code of any family: what cannot be described runs as before
            return f"{type(error).__name__}: {error}"

    def _step(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: "torch.Tensor | None" = None,
        position_ids: "torch.Tensor | None" = None,
        use_cache: "bool | None" = None,
        **_: Any,
    ) -> Any:
        """One token; None where it is not the next one of a plain cache."""
        assert self._parts is not None
        if use_cache is False or not isinstance(past_key_values, DynamicCache):
            return None
        position = past_key_values.get_seq_length()
        if not self._serves([position], attention_mask, position_ids):
            return None
        held = self._adopt(past_key_values)
        if held is None:
            return None
        self._hidden.copy_(self._parts.embed(input_ids)[0])
        turn = self._parts.turn([position])
        self._layers([cached for _layer, cached in held], turn)
        for layer, _cached in held:  # together, so that an interrupt has no time to come between
            layer.put()
        self._decoder.finish(self._parts.final_norm)
        self.steps += 1
        return MoeModelOutputWithPast(last_hidden_state=self._normed.clone()[None], past_key_values=past_key_values)

    def _prompt(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: "torch.Tensor | None" = None,
        position_ids: "torch.Tensor | None" = None,
        use_cache: "bool | None" = None,
        **_: Any,
    ) -> Any:
        """Many tokens; None where they are not the next ones of a plain cache, or of none."""
        assert self._parts is not None
        cache = past_key_values
        if not (cache is None or isinstance(cache, DynamicCache)):
            return None
        first = 0 if cache is None else cache.get_seq_length()
        positions = list(range(first, first + input_ids.shape[1]))
        if not self._serves(positions, attention_mask, position_ids):
            return None
        held = None if cache is None else self._adopt(cache)
        if (cache is not None and held is None) or not self._parts.takes(input_ids.shape[1]):
            return None  # what the modules put into an adopted cache is rounded, too
        prompt = self.prompt(self._parts.embed(input_ids)[0], positions)
        for index in range(len(self._parts.layers)):
            prompt.layer(index, self._parts.no_kv(index, self._kv_bits) if held is None else held[index][1])
        for layer, _cached in held or []:  # together, as in `_step`
            layer.put(len(positions))
        self.prompts += 1
        return MoeModelOutputWithPast(last_hidden_state=self._parts.norm(prompt.hidden)[None], past_key_values=cache)

    def _adopt(self, cache: Any) -> "list[tuple[kv.CompiledLayer, kv.CompiledKV]] | None":
        """What the layers of a cache hold; None where it is not one of one plain sequence."""
        assert self._parts is not None
        return kv.adopt(cache, self._parts.layouts, self._parts.windows, self._kv_bits)

    def _serves(self, positions: "list[int]", mask: Any, position_ids: "torch.Tensor | None") -> bool:
        """Whether tokens at `positions` follow all before them, and see those: no padding, no positions of their
        own."""
        assert self._parts is not None
        if not positions or not _sees_all(mask, positions[-1] + 1):
            return False
        if self._parts.limit is not None and positions[-1] >= self._parts.limit:
            return False
        return position_ids is None or (position_ids.ndim == 2 and position_ids.tolist() == [positions])

    def prompt(self, hidden: torch.Tensor, positions: "list[int]") -> Prompt:
        """`hidden` [n, H], embedded tokens at `positions`, ready for the layers, which work on it in place."""
        assert self._parts is not None
        turn = self._parts.turn(positions)
        return Prompt(self._parts, self._decoder, hidden.contiguous(), turn, self._rough)

    def layer(self, index: int, cached: kv.CompiledKV, turn: Turn, serve: ServeToken) -> None:
        """The residual stream through one layer."""
        assert self._parts is not None
        decoder, threads = self._decoder, count()
        experts, weights = decoder.attend(
            index,
            *cached.place(),
            cached.first,
            cached.length,
            turn.cosine.data_ptr(),
            turn.sine.data_ptr(),
            threads,
        )
        if self._parts.moe[index] is not None:
            self._experts(index, experts, weights, serve)

    def _experts(
        self, index: int, experts: "list[int]", weights: "list[float]", serve: ServeToken, foresees: bool = True
    ) -> None:
        """A layer from its router's choice on."""
        assert self._parts is not None
        decoder, threads, module = self._decoder, count(), self._parts.moe[index]
        serve(
            module.greenroom_layer,
            module,
            self._normed,
            experts,
            weights,
            self._outputs,
            lambda: decoder.shared(index, threads),
            decoder.shares,
            (lambda ahead, most: decoder.foresee(self._places[ahead], most, threads) if ahead in self._places else [])
            if foresees
            else None,
        )
        decoder.combine(index, self._outputs.data_ptr(), weights)

    def _layers(self, cached: "Sequence[kv.CompiledKV]", turn: Turn) -> None:
        """The residual stream through all layers, many in one call where their experts are there."""
        assert self._parts is not None
        index, caches = 0, None
        while index < len(cached):
            most = 0
            if self._residents is not None:
                records, most, foresight = self._residents.there(self._parts.moe)
            if most:
                caches = caches or native.caches([(*its.place(), its.first, its.length) for its in cached])
                index = self._walk(index, min(index + most, len(cached)), caches, turn, records, foresight)
            else:
                self.layer(index, cached[index], turn, self._serve)
                index += 1

    def _walk(self, first: int, last: int, caches: Any, turn: Turn, records: Any, foresight: "tuple[int, int]") -> int:
        """The residual stream from layer `first` on in one call, up to `last` or through the one that stops it by
        lacking an expert; gives the layer after that."""
        assert self._parts is not None and self._residents is not None
        before_s, residents, moe = native.experts_s(), self._residents, self._parts.moe
        with_shares = residents.wants_shares
        cosine, sine, outputs = turn.cosine.data_ptr(), turn.sine.data_ptr(), self._outputs.data_ptr()
        asked: list[tuple[list[int], list[float]]] = []

        def passed() -> "list[Passed]":
            found = self._decoder.passed()
            return [
                (moe[index].greenroom_layer, experts, weights, shares if with_shares else None)
                for index, experts, weights, shares in found
            ]

        def lacks(index: int, experts: "list[int]", weights: "list[float]", foreseen: "list[Any]") -> bool:
            asked.append((experts, weights))
            ahead = [(moe[place].greenroom_layer, ranked) for place, ranked in foreseen]
            return residents.lacks(moe[index].greenroom_layer, experts, ahead, passed)

        end: int
        end, foresee_s = self._decoder.walk(
            first, last, caches, cosine, sine, records, foresight, lacks, with_shares, outputs, count()
        )
        self.walks += 1
        residents.walked(passed(), native.experts_s() - before_s, foresee_s)
        if end < last:
            self._experts(end, *asked[-1], self._serve, foresees=False)
        return min(end + 1, last)

    @property
    def hidden(self) -> torch.Tensor:
        """The residual stream [1, H] between layers: what `layer` reads and writes."""
        return self._hidden


def _sees_all(mask: Any, length: int) -> bool:
    """Whether a mask, of whatever kind, hides none of `length` tokens."""
    if mask is None:
        return True
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] == length and bool(mask.all())
