// Where NVRTC is looked for, and which of several is taken.
#include "base/env.h"
#include "runtime/cuda/build_id.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/cuda/driver.h"
#include "runtime/cuda/loader_path.h"
#include "runtime/cuda/nvrtc.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <dirent.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <system_error>

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

std::string soname_of(int major) {
  return fmt::format("libnvrtc.so.{}", major);
}

/// By the names of the files that are loaded: dlopen() with RTLD_NOLOAD would search the disk.
bool is_loaded(const std::string& soname) {
  const auto is_it = [](dl_phdr_info* library, std::size_t, void* name) {
    const std::string_view path = library->dlpi_name;
    return path.substr(path.rfind('/') + 1).starts_with(*static_cast<const std::string*>(name)) ? 1 : 0;
  };
  std::string name = soname;
  return dl_iterate_phdr(is_it, &name) != 0;
}

/// The number that follows the prefix in a library's name, up to the next dot or the end.
std::optional<int> version_in(std::string_view name, std::string_view prefix) {
  int number = 0;
  if (!name.starts_with(prefix)) return std::nullopt;
  const char* const end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + prefix.size(), end, number);
  return error == std::errc() && (stop == end || *stop == '.') ? std::optional(number) : std::nullopt;
}

/// The minor version of an NVRTC by its file: the link of a toolkit leads to libnvrtc.so.13.0.88; beside that
/// of a wheel lie its builtins. Nothing when there are those of several.
std::optional<int> minor_of(const fs::path& library, int major) {
  std::error_code error;  // it is no link
  const std::string target = fs::read_symlink(library, error).filename();
  if (const auto minor = version_in(target, soname_of(major) + ".")) return minor;
  const std::string prefix = fmt::format("libnvrtc-builtins.so.{}.", major);
  std::optional<int> minor;
  const std::unique_ptr<DIR, int (*)(DIR*)> files(::opendir(library.parent_path().c_str()), ::closedir);
  while (const dirent* const file = files ? ::readdir(files.get()) : nullptr) {
    const auto found = version_in(file->d_name, prefix);
    if (!found) continue;
    if (minor && minor != found) return std::nullopt;
    minor = found;
  }
  return minor;
}

/// Opens the first NVRTC of a major version; `tried` tells every place and why it would not do.
const Nvrtc* open_major(int major, std::vector<std::string>& tried) {
  const std::string soname = soname_of(major);
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

/// An NVRTC by its file alone.
struct Glance {
  int major = 0, minor = 0;
  std::string build_id;
};

/// The file that open_major() would open.
std::optional<fs::path> file_of_major(int major) {
  const std::string soname = soname_of(major);
  std::error_code error;  // what can't be looked at is not there
  if (auto file = loader_path(soname); file && fs::exists(*file, error)) return file;
  for (const fs::path& folder : folders_of(major)) {
    if (fs::exists(folder / soname, error)) return folder / soname;
  }
  return std::nullopt;
}

/// Nothing where there is no file or it tells too little.
std::optional<Glance> glance_at(int major) {
  const auto file = file_of_major(major);
  if (!file) return std::nullopt;
  const auto minor = minor_of(*file, major);
  std::string id = build_id_in(*file);
  if (!minor || id.empty()) return std::nullopt;
  return Glance{major, *minor, std::move(id)};
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
    if (driver_or_none.ok()) driver_version_ = (*driver_or_none)->version;
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
    if (newest_major() < kMajors.back() && !only_chosen_) {
      return environment_failure(fmt::format(
          "the CUDA driver is of {} and loads nothing that NVRTC {} or later compiles: install driver 525 or "
          "later, or set ATTUNE_NVRTC to an older library",
          cuda_version_text(driver_version_), kMajors.back()));
    }
    return environment_failure(
        fmt::format("no usable NVRTC for sm_{}: install {}, or set ATTUNE_NVRTC to the library. "
                    "Tried:\n  {}",
                    sm, wheel(sm), fmt::join(tried_, "\n  ")));
  }

  /// Nothing when the library is open already: there is nothing to save then.
  std::optional<Glance> glance(int sm) {
    const std::lock_guard lock(mutex_);
    if (only_chosen_) return std::nullopt;
    for (const int major : kMajors) {
      if (!may_use(major, sm)) continue;
      if (by_major_.contains(major) || is_loaded(soname_of(major))) return std::nullopt;
      if (!glances_.contains(major)) glances_.emplace(major, glance_at(major));
      if (glances_[major]) return glances_[major];
    }
    return std::nullopt;
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
      if (!may_use(major, sm)) continue;
      if (const Nvrtc* nvrtc = of_major(major)) {
        found.push_back(nvrtc);
        if (nvrtc->knows(sm)) break;
      }
    }
    return found;
  }

  /// A driver loads no image of a newer major version than its own.
  int newest_major() const { return driver_version_ == 0 ? kMajors.front() : driver_version_ / 1000; }

  bool may_use(int major, int sm) const {
    return major <= newest_major() && (major < 13 || sm >= kOldestOf13);
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
  std::map<int, std::optional<Glance>> glances_;
  const Nvrtc* chosen_ = nullptr;
  bool only_chosen_ = false;
  int driver_version_ = 0;  // 0: there is none
};

Libraries& libraries() {
  static auto* shared = new Libraries;
  return *shared;
}

}  // namespace

Result<const Nvrtc*> nvrtc_for(const codegen::Arch& arch) {
  return libraries().find(arch.sm);
}

std::optional<codegen::CompilerId> nvrtc_at_a_glance(const codegen::Arch& arch) {
  const auto seen = libraries().glance(arch.sm);
  if (!seen) return std::nullopt;
  return codegen::CompilerId{nvrtc_identity(seen->major, seen->minor, seen->build_id),
                             nvrtc_options(seen->major, seen->minor, arch)};
}

NvrtcSearch search_nvrtc() {
  auto found = libraries().find(kOldestOf13);
  return {std::move(found), libraries().tried()};
}

}  // namespace attune::runtime
