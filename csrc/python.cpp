// beit3_fast._native: what is not a tensor op. No torch here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/isa.h"
#include "cpu/packed_weight.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define BEIT3_FAST_X86 1
#endif

extern "C" const char beit3_fast_stamp[];

namespace py = pybind11;

namespace {

#ifdef BEIT3_FAST_X86
// The register state that the operating system saves for a thread (XCR0).
uint64_t saved_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}
#endif

py::dict cpu_features() {
  py::dict features;
#ifdef BEIT3_FAST_X86
  uint32_t a = 0, b = 0, c1 = 0, d = 0, b7 = 0, c7 = 0, d7 = 0, a71 = 0, ignored = 0;
  __get_cpuid(1, &a, &b, &c1, &d);
  const bool leaf7 = __get_cpuid_count(7, 0, &a, &b7, &c7, &d7) != 0;
  // Sub-leaf 0 says in eax how many more there are.
  if (leaf7 && a >= 1) __get_cpuid_count(7, 1, &a71, &ignored, &ignored, &ignored);
  const auto bit = [](uint32_t word, int index) { return ((word >> index) & 1) != 0; };
  const uint64_t saved = bit(c1, 27) ? saved_state() : 0;
  const auto saves = [saved](uint64_t mask) { return (saved & mask) == mask; };
  const bool avx = saves(0x6), avx512 = saves(0xe6), amx = saves(0x60000);
  features["avx2"] = avx && bit(b7, 5);
  features["fma"] = avx && bit(c1, 12);
  features["avx512f"] = avx512 && bit(b7, 16);
  features["avx512bw"] = avx512 && bit(b7, 30);
  features["avx512vl"] = avx512 && bit(b7, 31);
  features["avx512dq"] = avx512 && bit(b7, 17);
  features["avx512_bf16"] = avx512 && bit(a71, 5);
  features["avx512_vnni"] = avx512 && bit(c7, 11);
  features["amx_tile"] = amx && bit(d7, 24);
  features["amx_bf16"] = amx && bit(d7, 22);
  features["amx_int8"] = amx && bit(d7, 25);
#endif
  return features;
}

// The stamp is "BEIT3_FAST_STAMP" followed by JSON.
py::object build_info() {
  const std::string stamp(beit3_fast_stamp);
  return py::module_::import("json").attr("loads")(stamp.substr(stamp.find('{')));
}

// One fp32 or bf16 (as uint16) weight in the layout that the CPU kernels read: the bytes that the
// op of the same name makes.
py::array pack_weight(const py::array& weight) {
  namespace cpu = beit3_fast::cpu;
  const bool is_float32 = py::isinstance<py::array_t<float>>(weight);
  const bool is_known = is_float32 || py::isinstance<py::array_t<uint16_t>>(weight);
  if (!is_known || weight.ndim() != 2 || weight.size() == 0) {
    throw py::value_error(
        "pack_weight: expected an array [out, in] of float32, or of uint16 for bfloat16, not "
        "empty; got shape " +
        py::str(weight.attr("shape")).cast<std::string>() + " of " +
        py::str(weight.dtype()).cast<std::string>());
  }
  const cpu::DType dtype = is_float32 ? cpu::DType::kFloat32 : cpu::DType::kBFloat16;
  const py::array rows = py::array::ensure(weight, py::array::c_style);
  const int64_t out_features = rows.shape(0), in_features = rows.shape(1);
  const int64_t bytes = cpu::packed_bytes(dtype, out_features, in_features);
  py::array packed(weight.dtype(), bytes / weight.itemsize());
  void* const to = packed.mutable_data();
  const void* const from = rows.data();
  {
    py::gil_scoped_release released;
    cpu::pack_weight(cpu::Pool{1, nullptr}, dtype, from, in_features, out_features, in_features,
                     to);
  }
  return packed;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU features, build information and weight packing";
  m.def("cpu_features", &cpu_features,
        "Instruction sets that processor and system offer, by their name in /proc/cpuinfo: "
        "dict[str, bool].");
  m.def(
      "cpu_isa", [] { return beit3_fast::cpu::isa_name(beit3_fast::cpu::isa()); },
      "The level that the CPU kernels run on here: portable, avx2, avx512, avx512_vnni,\n"
      "avx512_bf16 or amx_bf16. Raises RuntimeError where BEIT3_FAST_CPU_ISA names none of them.");
  m.def("pack_weight", &pack_weight, py::arg("weight"),
        "A weight [out, in] of float32, or of uint16 that holds bfloat16, in the layout of the CPU "
        "kernels:\n"
        "one dimension, the same dtype. Raises ValueError for other arrays.");
  m.def("build_info", &build_info, "What this was built from and for: dict[str, str].");
}
