#include "tests/unit/cpu_kernels.h"

#include "codegen/choose.h"
#include "codegen/unit.h"
#include "runtime/cpu/cpu_backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>

namespace attune::test {

std::vector<codegen::Arch> this_cpus_archs() {
  const auto backend = runtime::cpu_backend();
  REQUIRE(backend.ok());
  std::vector<codegen::Arch> archs{*codegen::cpu_arch(codegen::Isa::avx2)};
  if ((*backend)->arch().isa == codegen::Isa::avx512) archs.push_back((*backend)->arch());
  return archs;
}

runtime::Kernel& kernel_of(const codegen::Problem& problem, const codegen::Arch& arch) {
  static std::map<std::string, std::unique_ptr<runtime::Kernel>> kernels;
  auto& kernel = kernels[arch.target + " " + to_string(problem)];
  if (kernel == nullptr) {
    const auto choice = codegen::choose(problem, arch);
    REQUIRE(choice.ok());
    const auto unit =
        codegen::make_unit(choice->spec, arch, runtime::clang_compiler(arch), codegen::embedded_files());
    const auto image = runtime::clang_compile(unit);
    if (!image.ok()) FAIL(image.failure().message);
    auto loaded = (*runtime::cpu_backend())->load(image->bytes, unit.spec);
    REQUIRE(loaded.ok());
    kernel = std::move(loaded).value();
  }
  return *kernel;
}

AtTheEnd::AtTheEnd(const void* bytes, std::size_t count) {
  const std::size_t page = sysconf(_SC_PAGESIZE);
  const std::size_t readable = (count + page - 1) / page * page;
  size_ = readable + page;
  memory_ =
      static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  REQUIRE(memory_ != MAP_FAILED);
  REQUIRE(mprotect(memory_ + readable, page, PROT_NONE) == 0);
  data_ = memory_ + readable - count;
  std::memcpy(data_, bytes, count);
}

AtTheEnd::~AtTheEnd() {
  munmap(memory_, size_);
}

}  // namespace attune::test
