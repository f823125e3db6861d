"""One token through a model's layers by compiled code, over the same weights as transformers' modules.

`describe` reads a decoder's modules into the compiled decoder's terms, `kv` keeps keys and values in its layout, `step`
runs tokens and `proof` compares each layer with the modules before the first one. What is not understood, or does not
prove right, runs as before.
"""

from greenroom.decode.step import DecodeStep

__all__ = ["DecodeStep"]
