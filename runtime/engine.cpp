#include "runtime/engine.h"

#include "attune/blocks.h"
#include "attune/merge.h"
#include "base/log.h"
#include "cache/single_flight.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/hot_table.h"
#include "runtime/split_keys.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <fstream>
#include <map>
#include <mutex>
#include <span>
#include <string_view>
#include <utility>

namespace attune::runtime {
namespace {

constexpr int kMaxCudaDevices = 64;

/// 0 is the CPU, 1 + n is CUDA device n.
Result<std::size_t> table_index(Device device) {
  if (device.type == DeviceType::cpu) return std::size_t{0};
  if (device.index < 0 || device.index >= kMaxCudaDevices) {
    return invalid_argument(fmt::format("no CUDA device {}", device.index));
  }
  return static_cast<std::size_t>(device.index) + 1;
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

struct Engine::State {
  State(EngineOptions chosen, TemplateSet templates)
      : options(std::move(chosen)), images(options, std::move(templates)) {}

  const EngineOptions options;
  Images images;

  std::array<HotTable, kMaxCudaDevices + 1> tables;
  std::array<std::atomic<Backend*>, kMaxCudaDevices + 1> backends{};  // of devices that were asked for
  cache::SingleFlight<std::pair<std::size_t, Digest>, Kernel> loads;
  std::mutex loaded_mutex;
  std::map<std::pair<std::size_t, Digest>, std::shared_ptr<Kernel>> loaded;
  std::mutex record_mutex;

  std::atomic<std::uint64_t> load_count{0};
  std::atomic<std::uint64_t> launches{0};

  Result<std::shared_ptr<Kernel>> kernel_for(std::size_t index, Backend& backend, const codegen::Unit& unit,
                                             const std::string& candidate);
  Result<std::shared_ptr<Kernel>> load(Backend& backend, const codegen::Unit& unit,
                                       const std::string& candidate);
  Result<std::unique_ptr<Kernel>> load_another(Backend& backend, const codegen::Unit& unit,
                                               const std::string& candidate, const std::string& refused);
  Result<const ReadyKernel*> ready(const codegen::Problem& problem, Device device, void* stream);
  Result<std::unique_ptr<ReadyKernel>> make_ready(const codegen::Problem& problem, std::size_t index,
                                                  Backend& backend, std::string_view tuned_candidate);
  Result<Backend*> allowed_backend(Device device);
  std::optional<TunedChoice> tuned(const codegen::Problem& problem, const Backend& backend);
  void record(const codegen::Problem& problem, const codegen::Arch& arch);
  void launched(const ReadyKernel& ready);
  Result<void> run_split(const Call& call);
};

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

// ---- What a call does whose kernel is not ready: obtain, load, insert ----

/// The bytes in that layer are what was stored, yet the loader refuses them: build them anew, once. The build
/// serves this process where it can't be stored, too.
Result<std::unique_ptr<Kernel>> Engine::State::load_another(Backend& backend, const codegen::Unit& unit,
                                                            const std::string& candidate,
                                                            const std::string& refused) {
  cache::Store& store = images.store();
  if (refused == store.root()) {
    store.quarantine(unit.key);
  } else if (const auto entry = store.find(unit.key)) {  // built by a process that met the same refusal
    auto kernel = backend.load(entry->payload, unit.spec);
    if (kernel.ok()) return kernel;
    store.quarantine(unit.key);
  }
  ATTUNE_ASSIGN(rebuilt, images.compile(unit, candidate));
  return backend.load(rebuilt->image, unit.spec);
}

Result<std::shared_ptr<Kernel>> Engine::State::load(Backend& backend, const codegen::Unit& unit,
                                                    const std::string& candidate) {
  ATTUNE_ASSIGN(obtained, images.obtain(unit, candidate));
  auto kernel = backend.load(obtained->image, unit.spec);
  const auto refused = [&] { return !kernel.ok() && kernel.failure().kind == ErrorKind::invalid_argument; };
  if (refused() && obtained->source == Source::disk) {
    log(LogLevel::warn, fmt::format("cached kernel {} in {} was refused ({}); looking elsewhere",
                                    unit.key.hex().substr(0, 12), obtained->layer, kernel.failure().message));
    kernel = load_another(backend, unit, candidate, obtained->layer);
  }
  if (refused()) return environment_failure(kernel.failure().message);  // none of the caller's arguments
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
  std::string candidate;
  if (const auto choice = tuned(problem, *backend)) candidate = choice->candidate;
  auto made = make_ready(problem, index, *backend, candidate);
  if (!made.ok() && !candidate.empty()) {
    log(LogLevel::warn, fmt::format("the tuned choice {} cannot be had ({}); the usual choice runs",
                                    candidate, made.failure().message));
    made = make_ready(problem, index, *backend, {});
  }
  ATTUNE_ASSIGN(ready, std::move(made));
  record(problem, backend->arch());
  return tables[index].insert(std::move(ready));
}

Result<std::unique_ptr<ReadyKernel>> Engine::State::make_ready(const codegen::Problem& problem,
                                                               std::size_t index, Backend& backend,
                                                               std::string_view tuned_candidate) {
  ATTUNE_ASSIGN(choice, codegen::choose(problem, backend.arch(), tuned_candidate));
  ATTUNE_ASSIGN(unit, images.unit_of(choice.spec, backend.arch()));
  ATTUNE_ASSIGN(kernel, kernel_for(index, backend, unit, choice.candidate->name));
  return std::make_unique<ReadyKernel>(ReadyKernel{problem, std::move(kernel), choice.candidate->name});
}

/// The choice that calls follow, unless they are told not to.
std::optional<TunedChoice> Engine::State::tuned(const codegen::Problem& problem, const Backend& backend) {
  if (!options.follow_tuned || problem.operation != kernel::Operation::forward) return std::nullopt;
  auto choice = images.tuned(problem, backend);
  if (choice.ok()) return std::move(*choice);
  log(LogLevel::warn, fmt::format("the tuned choice for {} is ignored: {}", codegen::to_string(problem),
                                  choice.failure().message));
  return std::nullopt;
}

/// Without a lock once it is known.
Result<Backend*> Engine::State::allowed_backend(Device device) {
  ATTUNE_ASSIGN(index, table_index(device));
  if (Backend* known = backends[index].load(std::memory_order_acquire)) return known;
  ATTUNE_TRY(check_allowed(options.backend, device));
  ATTUNE_ASSIGN(backend, backend_of(device));
  backends[index].store(backend, std::memory_order_release);
  return backend;
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

/// Both kernels are loaded before the first is launched.
Result<void> Engine::State::run_split(const Call& call) {
  SplitCall split;
  split_keys(call, split);
  ATTUNE_ASSIGN(attention, ready(split.attention.problem, call.device, call.stream));
  ATTUNE_ASSIGN(merge, ready(split.merge.problem, call.device, call.stream));
  ATTUNE_TRY(attention->kernel->forward(split.attention.params, call.stream));
  launched(*attention);
  ATTUNE_TRY(merge->kernel->merge(split.merge.params, call.stream));
  launched(*merge);
  last_name = &attention->name;
  return done();
}

Result<void> Engine::plan(Call& call) {
  if (kernel::output_rows(call.params) == 0) return done();
  ATTUNE_ASSIGN(backend, state_->allowed_backend(call.device));
  call.params.splits = splits_of(call, backend->arch(), backend->multiprocessors());
  return done();
}

Result<void> Engine::run(const Call& call) {
  const kernel::ForwardParams& params = call.params;
  if (params.batch == 0 || params.groups == 0 || params.heads == 0 || params.len_q == 0) return done();
  if (params.splits > 1) return state_->run_split(call);
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
  BackwardPlan plan;
  ATTUNE_TRY(this->plan(call, plan));
  return run(call, plan);
}

Result<void> Engine::run(const BackwardCall& call, const BackwardPlan& plan) {
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

Result<void> Engine::plan(const BackwardCall& call, BackwardPlan& plan) {
  ATTUNE_ASSIGN(backend, state_->allowed_backend(call.device));
  return plan_of(call, backend->arch(), plan);
}

Result<void> Engine::prepare(const codegen::Problem& problem, Device device, void* stream) {
  ATTUNE_TRY(state_->ready(problem, device, stream));
  return done();
}

Result<std::shared_ptr<const Obtained>> Engine::precompile(const codegen::Problem& problem,
                                                           const codegen::Arch& arch) {
  ATTUNE_ASSIGN(pair, state_->images.unit_of(problem, arch));
  return state_->images.obtain(pair.first, pair.second.candidate->name);
}

Result<Explanation> Engine::explain(const codegen::Problem& problem, const codegen::Arch& arch,
                                    std::optional<Device> device) {
  Explanation result{.problem = problem};
  if (device) {
    ATTUNE_ASSIGN(backend, backend_of(*device));
    result.tuned = state_->tuned(problem, *backend);
  }
  ATTUNE_ASSIGN(choice, codegen::choose(problem, arch, result.tuned ? result.tuned->candidate : ""));
  result.choice = std::move(choice);
  auto unit = state_->images.unit_of(result.choice.spec, arch);
  if (!unit.ok()) {
    result.compiler_problem = unit.failure().message;
    result.state = "unknown";
    result.unit = codegen::make_unit(result.choice.spec, arch, {}, state_->images.templates());
    return result;
  }
  result.unit = std::move(*unit);
  result.layer = state_->images.layers().locate(result.unit.key).value_or("");
  if (!result.layer.empty()) result.state = "cached";
  if (device) {
    ATTUNE_ASSIGN(index, table_index(*device));
    if (state_->tables[index].find(problem) != nullptr) result.state = "loaded";
  }
  return result;
}

Result<std::shared_ptr<Kernel>> Engine::kernel_of(const codegen::Candidate& candidate,
                                                  const codegen::Problem& problem, Device device) {
  ATTUNE_ASSIGN(index, table_index(device));
  ATTUNE_TRY(check_allowed(state_->options.backend, device));
  ATTUNE_ASSIGN(backend, backend_of(device));
  ATTUNE_ASSIGN(unit, state_->images.unit_of(codegen::spec_of(candidate, problem), backend->arch()));
  return state_->kernel_for(index, *backend, unit, candidate.name);
}

Result<void> Engine::keep(const TunedChoice& choice, const codegen::Problem& problem, Device device) {
  ATTUNE_ASSIGN(backend, backend_of(device));
  state_->images.keep(choice, problem, *backend);
  return done();
}

Counters Engine::counters() const {
  const cache::Counters& cached = state_->images.store().counters();
  return {.compiles = state_->images.compiles(),
          .loads = state_->load_count.load(),
          .launches = state_->launches.load(),
          .cache_hits = cached.hits.load() + state_->images.layers().shared_hits(),
          .cache_misses = state_->images.layers().misses(),
          .cache_defects = cached.defects.load(),
          .cache_stores = cached.stores.load()};
}

cache::Store& Engine::store() {
  return state_->images.store();
}

std::span<const codegen::EmbeddedFile> Engine::headers() const {
  return state_->images.templates();
}

const std::string& last_kernel_name() {
  static const std::string kNone;
  return last_name == nullptr ? kNone : *last_name;
}

Result<Backend*> backend_of(Device device) {
  return device.type == DeviceType::cpu ? cpu_backend() : cuda_backend(device.index);
}

}  // namespace attune::runtime
