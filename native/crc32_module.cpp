// The Python module greenroom.checksum._crc32.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "crc32.h"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::uint32_t crc32(const Bytes& bytes, std::uint32_t before) {
    const auto nbytes = static_cast<std::int64_t>(bytes.size());
    nb::gil_scoped_release release;
    return greenroom::crc32(bytes.data(), nbytes, before);
}

}  // namespace

NB_MODULE(_crc32, module) {
    nb::set_leak_warnings(false);  // a thread that outlives the interpreter keeps what it holds
    module.def("crc32", &crc32, nb::arg(), nb::arg() = 0);
}
