// Where NVRTC is looked for, and which of several is taken.
#include "base/env.h"
#include "runtime/cuda/driver.h"
#include "runtime/cuda/nvrtc.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <mutex>

namespace attune::runtime {
namespace {

namespace fs = std::filesystem;

constexpr std::array kMajors{13, 12};  // the preferred one first
constexpr int kOldestOf13 = 75;        // CUDA 13 dropped what came before Turing

// Inside a site-packages folder: the wheels nvidia-cuda-nvrtc (13) and nvidia-cuda-nvrtc-cu12.
const char* wheel_folder(int major) {
  return major >= 13 ? "nvidia/cu13/lib" : "nvidia/cuda_nvrtc/lib";
}

/// The site-packages folders that may hold the wheels: the one that this library is installed in, and the
/// virtual environment's.
std::vector<fs::path> site_packages() {
  std::vector<fs::path> folders;
  Dl_info info{};
  static const char anchor = 0;
  if (dladdr(&anchor, &info) != 0 && info.dli_fname != nullptr) {
    for (fs::path folder = fs::path(info.dli_fname).parent_path(); folder.has_relative_path();
         folder = folder.parent_path()) {
      if (folder.filename() == "site-packages") folders.push_back(folder);
    }
  }
  if (const auto environment = env("VIRTUAL_ENV")) {
    std::error_code error;  // an unreadable folder is one without wheels
    for (const auto& entry : fs::directory_iterator(fs::path(*environment) / "lib", error)) {
      if (entry.path().filename().string().starts_with("python3")) {
        folders.push_back(entry.path() / "site-packages");
      }
    }
  }
  return folders;
}

/// Absolute paths to look at, in order.
std::vector<fs::path> folders_of(int major) {
  std::vector<fs::path> folders;
  if (const auto home = env("CUDA_HOME")) {
    folders.emplace_back(fs::path(*home) / "lib64");
    folders.emplace_back(fs::path(*home) / "lib");
  }
  folders.emplace_back("/usr/local/cuda/lib64");
  folders.emplace_back("/usr/local/cuda/lib");
  for (const fs::path& site : site_packages()) folders.push_back(site / wheel_folder(major));
  return folders;
}

/// Opens the first NVRTC of a major version; `tried` tells every place and why it would not do.
const Nvrtc* open_major(int major, std::vector<std::string>& tried) {
  const std::string soname = fmt::format("libnvrtc.so.{}", major);
  const auto attempt = [&](const std::string& library, bool only_if_loaded) -> const Nvrtc* {
    auto opened = Nvrtc::open(library, only_if_loaded);
    if (opened.ok()) {
      tried.push_back(fmt::format("{}: found", opened->path()));
      return new Nvrtc(std::move(*opened));  // lives as long as the process
    }
    tried.push_back(opened.failure().message);
    return nullptr;
  };
  if (const Nvrtc* nvrtc = attempt(soname, true)) return nvrtc;
  if (const Nvrtc* nvrtc = attempt(soname, false)) return nvrtc;
  for (const fs::path& folder : folders_of(major)) {
    if (const Nvrtc* nvrtc = attempt(folder / soname, false)) return nvrtc;
  }
  return nullptr;
}

/// What the process has found so far. The search runs once per major version.
class Libraries {
 public:
  Libraries() {
    if (const auto path = env("ATTUNE_NVRTC")) {
      auto opened = Nvrtc::open(*path);
      tried_.push_back(fmt::format("ATTUNE_NVRTC: {}", opened.ok() ? *path : opened.failure().message));
      if (opened.ok()) chosen_ = new Nvrtc(std::move(*opened));
      only_chosen_ = true;
    }
    const auto driver_or_none = driver();
    if (driver_or_none.ok()) newest_ = (*driver_or_none)->version / 1000;
  }

  Result<const Nvrtc*> find(int sm) {
    const std::lock_guard lock(mutex_);
    const Nvrtc* too_old = nullptr;
    for (const Nvrtc* nvrtc : usable(sm)) {
      if (nvrtc->knows(sm)) return nvrtc;
      too_old = nvrtc;
    }
    if (too_old != nullptr) {
      return environment_failure(fmt::format(
          "NVRTC {}.{} ({}) cannot compile for sm_{}, only for sm_{}: install {}", too_old->major(),
          too_old->minor(), too_old->path(), sm, fmt::join(too_old->archs(), ", sm_"), wheel(sm)));
    }
    return environment_failure(
        fmt::format("no usable NVRTC for sm_{}: install {}, or set ATTUNE_NVRTC to the library. "
                    "Tried:\n  {}",
                    sm, wheel(sm), fmt::join(tried_, "\n  ")));
  }

  std::vector<std::string> tried() {
    const std::lock_guard lock(mutex_);
    return tried_;
  }

 private:
  /// Opened libraries that may compile for the architecture, the preferred one first.
  std::vector<const Nvrtc*> usable(int sm) {
    if (only_chosen_)
      return chosen_ == nullptr ? std::vector<const Nvrtc*>{} : std::vector<const Nvrtc*>{chosen_};
    std::vector<const Nvrtc*> found;
    for (const int major : kMajors) {
      if (major > newest_ || (major >= 13 && sm < kOldestOf13)) continue;
      if (const Nvrtc* nvrtc = of_major(major)) {
        found.push_back(nvrtc);
        if (nvrtc->knows(sm)) break;
      }
    }
    return found;
  }

  const Nvrtc* of_major(int major) {
    const auto known = by_major_.find(major);
    if (known != by_major_.end()) return known->second;
    return by_major_.emplace(major, open_major(major, tried_)).first->second;
  }

  static std::string wheel(int sm) {
    return sm < kOldestOf13 ? "CUDA 12's NVRTC ('pip install nvidia-cuda-nvrtc-cu12')"
                            : "a CUDA toolkit or 'pip install --upgrade nvidia-cuda-nvrtc'";
  }

  std::mutex mutex_;
  std::vector<std::string> tried_;
  std::map<int, const Nvrtc*> by_major_;
  const Nvrtc* chosen_ = nullptr;
  bool only_chosen_ = false;
  int newest_ = kMajors.front();  // a driver loads no image of a newer major version than its own
};

Libraries& libraries() {
  static auto* shared = new Libraries;
  return *shared;
}

}  // namespace

Result<const Nvrtc*> nvrtc_for(const codegen::Arch& arch) {
  return libraries().find(arch.sm);
}

NvrtcSearch search_nvrtc() {
  auto found = libraries().find(kOldestOf13);
  return {std::move(found), libraries().tried()};
}

}  // namespace attune::runtime
