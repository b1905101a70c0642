#include "runtime/engine.h"

#include "attune/merge.h"
#include "base/env.h"
#include "base/file.h"
#include "base/log.h"
#include "base/size.h"
#include "cache/single_flight.h"
#include "cache/turn.h"
#include "codegen/embedded.h"
#include "codegen/names.h"
#include "runtime/builds.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/hot_table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <chrono>
#include <fstream>
#include <map>
#include <mutex>
#include <span>
#include <system_error>
#include <utility>

namespace attune::runtime {
namespace {

using nlohmann::json;

constexpr int kMaxCudaDevices = 64;

/// 0 is the CPU, 1 + n is CUDA device n.
Result<std::size_t> table_index(Device device) {
  if (device.type == DeviceType::cpu) return std::size_t{0};
  if (device.index < 0 || device.index >= kMaxCudaDevices) {
    return invalid_argument(fmt::format("no CUDA device {}", device.index));
  }
  return static_cast<std::size_t>(device.index) + 1;
}

struct TemplateSet {
  std::vector<std::string> owned;  // texts read from a folder
  std::vector<codegen::EmbeddedFile> files;
};

/// The embedded templates, or the files of the same names in `folder`.
Result<TemplateSet> load_templates(const std::string& folder) {
  TemplateSet set;
  const auto embedded = codegen::embedded_files();
  set.files.assign(embedded.begin(), embedded.end());
  if (folder.empty()) return set;
  set.owned.reserve(set.files.size());
  for (codegen::EmbeddedFile& file : set.files) {
    ATTUNE_ASSIGN(bytes, read_file(std::filesystem::path(folder) / file.name));
    file.text = set.owned.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  return set;
}

/// What an entry says about itself. No time and no path: the same kernel gives the same bytes everywhere.
std::string entry_metadata(const codegen::Unit& unit, const std::string& candidate,
                           const std::string& compile_json) {
  json fields = json::object();
  for (const auto& [tag, value] : codegen::key_fields(unit)) fields[tag] = value;
  return json{{"attune", ATTUNE_VERSION},
              {"target", unit.arch.target},
              {"candidate", candidate},
              {"spec", spec_json(unit.spec)},
              {"compiler", unit.compiler.name},
              {"options", unit.compiler.options},
              {"key_fields", fields},
              {"compile", json::parse(compile_json, nullptr, /*allow_exceptions=*/false)}}
      .dump();
}

template <typename Value>
Result<Value> parse_choice(const char* variable, std::initializer_list<std::pair<const char*, Value>> choices,
                           Value fallback) {
  const auto text = env(variable);
  if (!text) return fallback;
  std::string known;
  for (const auto& [name, value] : choices) {
    if (*text == name) return value;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", name);
  }
  return invalid_argument(fmt::format("{}={}: expected one of {}", variable, *text, known));
}

Result<std::uint64_t> parse_max_bytes() {
  const auto text = env("ATTUNE_CACHE_MAX_SIZE");
  if (!text) return cache::kDefaultMaxBytes;
  auto size = parse_size(*text);
  if (!size.ok()) return invalid_argument("ATTUNE_CACHE_MAX_SIZE=" + size.failure().message);
  return size;
}

Result<std::chrono::seconds> parse_compile_limit() {
  const auto text = env("ATTUNE_COMPILE_LIMIT");
  if (!text) return std::chrono::duration_cast<std::chrono::seconds>(CompileChild().limit);
  int seconds = 0;
  const char* const end = text->data() + text->size();
  const auto [stop, error] = std::from_chars(text->data(), end, seconds);
  if (error == std::errc() && stop == end && seconds > 0) return std::chrono::seconds(seconds);
  return invalid_argument(fmt::format("ATTUNE_COMPILE_LIMIT={}: expected seconds, 1 or more", *text));
}

Result<void> check_allowed(BackendChoice choice, Device device) {
  if (choice == BackendChoice::cpu && device.type == DeviceType::cuda) {
    return environment_failure(
        "ATTUNE_BACKEND=cpu forbids CUDA tensors; unset it or move the tensors to the CPU");
  }
  if (choice == BackendChoice::cuda && device.type == DeviceType::cpu) {
    return environment_failure(
        "ATTUNE_BACKEND=cuda forbids CPU tensors; unset it or move the tensors to the GPU");
  }
  return done();
}

thread_local const std::string* last_name = nullptr;

}  // namespace

Result<EngineOptions> EngineOptions::from_environment() {
  EngineOptions options;
  options.cache_root = cache::default_root();
  ATTUNE_ASSIGN(mode, parse_choice<cache::Mode>("ATTUNE_CACHE_MODE",
                                                {{"rw", cache::Mode::rw},
                                                 {"ro", cache::Mode::ro},
                                                 {"off", cache::Mode::off},
                                                 {"refresh", cache::Mode::refresh}},
                                                cache::Mode::rw));
  ATTUNE_ASSIGN(jit,
                parse_choice<JitMode>(
                    "ATTUNE_JIT",
                    {{"auto", JitMode::automatic}, {"never", JitMode::never}, {"always", JitMode::always}},
                    JitMode::automatic));
  ATTUNE_ASSIGN(
      capture, parse_choice<CaptureMode>("ATTUNE_CAPTURE",
                                         {{"refuse", CaptureMode::refuse}, {"compile", CaptureMode::compile}},
                                         CaptureMode::refuse));
  ATTUNE_ASSIGN(compile_in,
                parse_choice<CompileIn>("ATTUNE_COMPILE_IN",
                                        {{"process", CompileIn::process}, {"child", CompileIn::child}},
                                        CompileIn::process));
  ATTUNE_ASSIGN(compile_limit, parse_compile_limit());
  ATTUNE_ASSIGN(backend, parse_choice<BackendChoice>("ATTUNE_BACKEND",
                                                     {{"auto", BackendChoice::automatic},
                                                      {"cuda", BackendChoice::cuda},
                                                      {"cpu", BackendChoice::cpu}},
                                                     BackendChoice::automatic));
  ATTUNE_ASSIGN(max_bytes, parse_max_bytes());
  options.cache_max_bytes = max_bytes;
  options.cache_paths = cache::shared_paths();
  ATTUNE_ASSIGN(remote, cache::remote_options());
  options.remote = std::move(remote);
  options.backend = backend;
  options.cache_mode = mode;
  options.jit = jit;
  options.capture = capture;
  options.compile_in = compile_in;
  options.compile_child.limit = compile_limit;
  options.template_dir = env("ATTUNE_TEMPLATE_DIR").value_or("");
  options.record_path = env("ATTUNE_RECORD").value_or("");
  return options;
}

struct Engine::State {
  State(EngineOptions chosen, TemplateSet set)
      : options(std::move(chosen)),
        templates(std::move(set)),
        store(options.cache_root.value_or(std::filesystem::path()),
              options.cache_root ? options.cache_mode : cache::Mode::off, warn, options.cache_max_bytes),
        layers(store, reads_disk() ? options.cache_paths : std::vector<std::filesystem::path>(), warn,
               open_remote()) {}

  EngineOptions options;
  TemplateSet templates;
  cache::Store store;
  cache::Layers layers;

  std::array<HotTable, kMaxCudaDevices + 1> tables;
  std::array<std::atomic<const codegen::Arch*>, kMaxCudaDevices + 1>
      archs{};  // of devices that were asked for
  cache::SingleFlight<Digest, const Obtained> images;
  cache::SingleFlight<std::pair<std::size_t, Digest>, Kernel> loads;
  std::mutex loaded_mutex;
  std::map<std::pair<std::size_t, Digest>, std::shared_ptr<Kernel>> loaded;
  std::mutex record_mutex;
  std::once_flag builds_once;
  std::vector<Build> builds;  // in the layers, once a compiler was missing

  std::atomic<std::uint64_t> compiles{0};
  std::atomic<std::uint64_t> load_count{0};
  std::atomic<std::uint64_t> launches{0};

  static void warn(const std::string& line) { log(LogLevel::warn, line); }
  std::unique_ptr<cache::Remote> open_remote() const;
  bool reads_disk() const {
    return options.cache_mode == cache::Mode::rw || options.cache_mode == cache::Mode::ro;
  }

  Result<std::pair<codegen::Unit, codegen::Choice>> unit_of(const codegen::Problem& problem,
                                                            const codegen::Arch& arch);
  Result<codegen::Unit> unit_of(const kernel::KernelSpec& spec, const codegen::Arch& arch);
  Result<std::shared_ptr<const Obtained>> obtain(const codegen::Unit& unit, const std::string& candidate);
  Result<std::shared_ptr<const Obtained>> compile(const codegen::Unit& unit, const std::string& candidate);
  Result<std::shared_ptr<Kernel>> kernel_for(std::size_t index, Backend& backend, const codegen::Unit& unit,
                                             const std::string& candidate);
  Result<std::shared_ptr<Kernel>> load(Backend& backend, const codegen::Unit& unit,
                                       const std::string& candidate);
  Result<std::unique_ptr<Kernel>> load_another(Backend& backend, const codegen::Unit& unit,
                                               const std::string& candidate, const std::string& refused);
  Result<const ReadyKernel*> ready(const codegen::Problem& problem, Device device, void* stream);
  Result<const codegen::Arch*> arch_of(Device device);
  void record(const codegen::Problem& problem, const codegen::Arch& arch);
  void launched(const ReadyKernel& ready);
};

std::unique_ptr<cache::Remote> Engine::State::open_remote() const {
  if (!options.remote || !reads_disk()) return nullptr;
  cache::RemoteOptions remote = *options.remote;
  remote.writable = remote.writable && options.cache_mode == cache::Mode::rw;
  return std::make_unique<cache::Remote>(std::move(remote));
}

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::~Engine() = default;

Result<std::unique_ptr<Engine>> Engine::create(EngineOptions options) {
  ATTUNE_ASSIGN(templates, load_templates(options.template_dir));
  return std::unique_ptr<Engine>(
      new Engine(std::make_unique<State>(std::move(options), std::move(templates))));
}

Result<Engine*> Engine::global() {
  // Leaked on purpose: other threads may still launch while the process exits. A failure (a bad variable)
  // stays.
  static const auto* engine = [] {
    auto options = EngineOptions::from_environment();
    if (!options.ok()) return new Result<std::unique_ptr<Engine>>(options.failure());
    return new Result<std::unique_ptr<Engine>>(create(std::move(*options)));
  }();
  if (!engine->ok()) return engine->failure();
  return engine->value().get();
}

// ---- Miss path: choose, emit, look up, compile, load ----

Result<std::pair<codegen::Unit, codegen::Choice>> Engine::State::unit_of(const codegen::Problem& problem,
                                                                         const codegen::Arch& arch) {
  ATTUNE_ASSIGN(choice, codegen::choose(problem, arch));
  ATTUNE_ASSIGN(unit, unit_of(choice.spec, arch));
  return std::pair{std::move(unit), std::move(choice)};
}

/// By the compiler of this machine, which is not opened for a kernel that the layers have; where it is
/// missing, by one whose kernel they have.
Result<codegen::Unit> Engine::State::unit_of(const kernel::KernelSpec& spec, const codegen::Arch& arch) {
  if (options.jit != JitMode::always && arch.backend == codegen::Backend::cuda) {
    if (auto likely = nvrtc_at_a_glance(arch)) {
      codegen::Unit unit = codegen::make_unit(spec, arch, std::move(*likely), templates.files);
      if (layers.locate(unit.key)) return unit;
    }
  }
  auto compiler = compiler_for(arch);
  if (compiler.ok()) return codegen::make_unit(spec, arch, std::move(*compiler), templates.files);
  if (options.jit == JitMode::always) return compiler.failure();
  std::call_once(builds_once, [this] { builds = builds_in(layers.descriptions()); });
  for (const Build& build : builds) {
    if (build.target != arch.target) continue;
    codegen::Unit unit = codegen::make_unit(spec, arch, build.compiler, templates.files);
    if (layers.locate(unit.key)) return unit;
  }
  return compiler.failure();
}

Result<std::shared_ptr<const Obtained>> Engine::State::obtain(const codegen::Unit& unit,
                                                              const std::string& candidate) {
  return images.run(unit.key, [&]() -> Result<std::shared_ptr<const Obtained>> {
    const auto take = [&](cache::Found&& found) {
      log(LogLevel::debug, fmt::format("kernel {} is from {}", unit.key.hex().substr(0, 12), found.layer));
      return std::make_shared<const Obtained>(Obtained{unit, candidate, std::move(found.entry.metadata_json),
                                                       std::move(found.entry.payload), Source::disk,
                                                       std::move(found.layer)});
    };
    if (options.jit == JitMode::always) return compile(unit, candidate);
    if (auto found = layers.find(unit.key)) return take(std::move(*found));
    if (options.jit == JitMode::never) return compile(unit, candidate);  // which says why not
    cache::Turn turn = cache::take_turn(store, unit.key);                // until the new entry is stored
    if (turn.entry) return take({std::move(*turn.entry), store.root().string()});
    return compile(unit, candidate);
  });
}

Result<std::shared_ptr<const Obtained>> Engine::State::compile(const codegen::Unit& unit,
                                                               const std::string& candidate) {
  if (options.jit == JitMode::never) {
    return environment_failure(
        fmt::format("kernel {} ({}) for {} is not in the cache and ATTUNE_JIT=never forbids compiling; list "
                    "the problem for "
                    "`attune precompile --arch {}` and run that first",
                    unit.key.hex().substr(0, 12), candidate, unit.arch.target, unit.arch.target));
  }
  const auto begin = std::chrono::steady_clock::now();
  ATTUNE_ASSIGN(image, options.compile_in == CompileIn::child ? compile_in_child(unit, options.compile_child)
                                                              : compile_for(unit));
  compiles.fetch_add(1, std::memory_order_relaxed);
  store.compiled();
  if (log_enabled(LogLevel::info)) {
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    log(LogLevel::info, fmt::format("compiled {} {} for {} in {:.0f} ms", candidate,
                                    unit.key.hex().substr(0, 12), unit.arch.target, took.count()));
  }
  auto obtained = std::make_shared<Obtained>(Obtained{unit, candidate,
                                                      entry_metadata(unit, candidate, image.metadata_json),
                                                      std::move(image.bytes), Source::compiler, ""});
  layers.store({.key = unit.key, .metadata_json = obtained->metadata_json, .payload = obtained->image});
  return std::shared_ptr<const Obtained>(std::move(obtained));
}

/// The bytes in that layer are what was stored, yet the loader refuses them: build them anew, once. The build
/// serves this process where it can't be stored, too.
Result<std::unique_ptr<Kernel>> Engine::State::load_another(Backend& backend, const codegen::Unit& unit,
                                                            const std::string& candidate,
                                                            const std::string& refused) {
  if (refused == store.root()) {
    store.quarantine(unit.key);
  } else if (const auto entry = store.find(unit.key)) {  // built by a process that met the same refusal
    auto kernel = backend.load(entry->payload, unit.spec);
    if (kernel.ok()) return kernel;
    store.quarantine(unit.key);
  }
  ATTUNE_ASSIGN(rebuilt, compile(unit, candidate));
  return backend.load(rebuilt->image, unit.spec);
}

Result<std::shared_ptr<Kernel>> Engine::State::load(Backend& backend, const codegen::Unit& unit,
                                                    const std::string& candidate) {
  ATTUNE_ASSIGN(obtained, obtain(unit, candidate));
  auto kernel = backend.load(obtained->image, unit.spec);
  if (!kernel.ok() && obtained->source == Source::disk) {
    log(LogLevel::warn, fmt::format("cached kernel {} in {} was refused ({}); looking elsewhere",
                                    unit.key.hex().substr(0, 12), obtained->layer, kernel.failure().message));
    kernel = load_another(backend, unit, candidate, obtained->layer);
  }
  if (!kernel.ok()) return kernel.failure();
  load_count.fetch_add(1, std::memory_order_relaxed);
  return std::shared_ptr<Kernel>(std::move(*kernel));
}

Result<std::shared_ptr<Kernel>> Engine::State::kernel_for(std::size_t index, Backend& backend,
                                                          const codegen::Unit& unit,
                                                          const std::string& candidate) {
  const std::pair slot{index, unit.key};
  return loads.run(slot, [&]() -> Result<std::shared_ptr<Kernel>> {
    {
      const std::lock_guard lock(loaded_mutex);
      if (const auto found = loaded.find(slot); found != loaded.end()) return found->second;
    }
    ATTUNE_ASSIGN(kernel, load(backend, unit, candidate));
    const std::lock_guard lock(loaded_mutex);
    loaded.emplace(slot, kernel);
    return kernel;
  });
}

Result<const ReadyKernel*> Engine::State::ready(const codegen::Problem& problem, Device device,
                                                void* stream) {
  ATTUNE_ASSIGN(index, table_index(device));
  if (const ReadyKernel* found = tables[index].find(problem)) return found;
  ATTUNE_TRY(check_allowed(options.backend, device));
  ATTUNE_ASSIGN(backend, backend_of(device));
  if (options.capture == CaptureMode::refuse) ATTUNE_TRY(backend->may_load(stream));
  ATTUNE_ASSIGN(pair, unit_of(problem, backend->arch()));
  const auto& [unit, choice] = pair;
  ATTUNE_ASSIGN(kernel, kernel_for(index, *backend, unit, choice.candidate->name));
  record(problem, backend->arch());
  return tables[index].insert(
      std::make_unique<ReadyKernel>(ReadyKernel{problem, std::move(kernel), choice.candidate->name}));
}

/// Without a lock once it is known.
Result<const codegen::Arch*> Engine::State::arch_of(Device device) {
  ATTUNE_ASSIGN(index, table_index(device));
  if (const codegen::Arch* known = archs[index].load(std::memory_order_acquire)) return known;
  ATTUNE_TRY(check_allowed(options.backend, device));
  ATTUNE_ASSIGN(backend, backend_of(device));
  archs[index].store(&backend->arch(), std::memory_order_release);
  return &backend->arch();
}

void Engine::State::record(const codegen::Problem& problem, const codegen::Arch& arch) {
  if (options.record_path.empty()) return;
  const std::lock_guard lock(record_mutex);
  std::ofstream file(options.record_path, std::ios::app);
  file << codegen::to_string(problem) << "  # " << arch.target << '\n';
  file.flush();
  if (!file) log(LogLevel::warn, fmt::format("ATTUNE_RECORD: cannot write to {}", options.record_path));
}

void Engine::State::launched(const ReadyKernel& ready) {
  launches.fetch_add(1, std::memory_order_relaxed);
  last_name = &ready.name;
}

// ---- Calls ----

Result<void> Engine::run(const Call& call) {
  const kernel::ForwardParams& params = call.params;
  if (params.batch == 0 || params.groups == 0 || params.heads == 0 || params.len_q == 0) return done();
  ATTUNE_ASSIGN(ready, state_->ready(call.problem, call.device, call.stream));
  ATTUNE_TRY(ready->kernel->forward(params, call.stream));
  state_->launched(*ready);
  return done();
}

Result<void> Engine::run(const MergeCall& call) {
  if (kernel::merge_rows(call.params) == 0) return done();
  ATTUNE_ASSIGN(ready, state_->ready(call.problem, call.device, call.stream));
  ATTUNE_TRY(ready->kernel->merge(call.params, call.stream));
  state_->launched(*ready);
  return done();
}

Result<void> Engine::run(const GradMergeCall& call) {
  if (kernel::merge_rows(call.params) == 0) return done();
  ATTUNE_ASSIGN(ready, state_->ready(call.problem, call.device, call.stream));
  kernel::GradMergeParams params = call.params;
  for (std::span rest(call.chunks); !rest.empty();) {
    const auto now = rest.first(std::min<std::size_t>(rest.size(), kernel::kMaxGradChunks));
    std::ranges::copy(now, params.chunk);
    params.chunks = static_cast<int>(now.size());
    ATTUNE_TRY(ready->kernel->grad_merge(params, call.stream));
    state_->launched(*ready);
    rest = rest.subspan(now.size());
  }
  return done();
}

Result<void> Engine::run(const BackwardCall& call) {
  ATTUNE_ASSIGN(plan, this->plan(call));
  std::array<const ReadyKernel*, std::tuple_size_v<decltype(plan.steps)>> kernels{};
  for (std::size_t i = 0; i < plan.count; ++i) {
    ATTUNE_ASSIGN(ready, state_->ready(plan.steps[i].problem, call.device, call.stream));
    kernels[i] = ready;
  }
  for (std::size_t i = 0; i < plan.count; ++i) {
    ATTUNE_TRY(kernels[i]->kernel->backward(plan.steps[i].params, call.stream));
    state_->launched(*kernels[i]);
  }
  last_name = &kernels[plan.main]->name;
  return done();
}

Result<BackwardPlan> Engine::plan(const BackwardCall& call) {
  ATTUNE_ASSIGN(arch, state_->arch_of(call.device));
  return plan_of(call, *arch);
}

Result<void> Engine::prepare(const codegen::Problem& problem, Device device, void* stream) {
  ATTUNE_TRY(state_->ready(problem, device, stream));
  return done();
}

Result<std::shared_ptr<const Obtained>> Engine::precompile(const codegen::Problem& problem,
                                                           const codegen::Arch& arch) {
  ATTUNE_ASSIGN(pair, state_->unit_of(problem, arch));
  return state_->obtain(pair.first, pair.second.candidate->name);
}

Result<Explanation> Engine::explain(const codegen::Problem& problem, const codegen::Arch& arch,
                                    std::optional<Device> device) {
  Explanation result{.problem = problem};
  ATTUNE_ASSIGN(choice, codegen::choose(problem, arch));
  result.choice = std::move(choice);
  auto unit = state_->unit_of(result.choice.spec, arch);
  if (!unit.ok()) {
    result.compiler_problem = unit.failure().message;
    result.state = "unknown";
    result.unit = codegen::make_unit(result.choice.spec, arch, {}, state_->templates.files);
    return result;
  }
  result.unit = std::move(*unit);
  result.layer = state_->layers.locate(result.unit.key).value_or("");
  if (!result.layer.empty()) result.state = "cached";
  if (device) {
    ATTUNE_ASSIGN(index, table_index(*device));
    if (state_->tables[index].find(problem) != nullptr) result.state = "loaded";
  }
  return result;
}

Counters Engine::counters() const {
  const cache::Counters& cached = state_->store.counters();
  return {.compiles = state_->compiles.load(),
          .loads = state_->load_count.load(),
          .launches = state_->launches.load(),
          .cache_hits = cached.hits.load() + state_->layers.shared_hits(),
          .cache_misses = state_->layers.misses(),
          .cache_defects = cached.defects.load(),
          .cache_stores = cached.stores.load()};
}

cache::Store& Engine::store() {
  return state_->store;
}

std::span<const codegen::EmbeddedFile> Engine::headers() const {
  return state_->templates.files;
}

const std::string& last_kernel_name() {
  static const std::string kNone;
  return last_name == nullptr ? kNone : *last_name;
}

Result<Backend*> backend_of(Device device) {
  return device.type == DeviceType::cpu ? cpu_backend() : cuda_backend(device.index);
}

Result<codegen::CompilerId> compiler_for(const codegen::Arch& arch) {
  if (arch.backend == codegen::Backend::cpu) return clang_compiler(arch);
  return nvrtc_compiler(arch);
}

Result<Image> compile_for(const codegen::Unit& unit) {
  return unit.arch.backend == codegen::Backend::cpu ? clang_compile(unit) : nvrtc_compile(unit);
}

}  // namespace attune::runtime
