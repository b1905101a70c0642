#include "runtime/cpu/plugin/phases.h"

#include <clang/Basic/DiagnosticOptions.h>
#include <clang/Basic/TargetInfo.h>
#include <clang/CodeGen/BackendUtil.h>
#include <clang/CodeGen/CodeGenAction.h>
#include <clang/Frontend/CompilerInstance.h>
#include <clang/Frontend/CompilerInvocation.h>
#include <clang/Frontend/TextDiagnosticPrinter.h>
#include <clang/Lex/HeaderSearchOptions.h>
#include <llvm/IR/DiagnosticHandler.h>
#include <llvm/IR/DiagnosticInfo.h>
#include <llvm/IR/DiagnosticPrinter.h>
#include <llvm/IR/LLVMContext.h>
#include <llvm/IR/Module.h>
#include <llvm/Support/TargetSelect.h>
#include <llvm/Support/VirtualFileSystem.h>
#include <llvm/Support/raw_ostream.h>

#include <memory>
#include <mutex>

namespace attune::plugin {
namespace {

using llvm::StringRef;

// Kernels are included by name ("attune/spec.h") from this folder of the in-memory file system.
constexpr const char* kRoot = "/attune-kernel/";

void initialise_llvm() {
  static std::once_flag once;
  std::call_once(once, [] {
    LLVMInitializeX86TargetInfo();
    LLVMInitializeX86Target();
    LLVMInitializeX86TargetMC();
    LLVMInitializeX86AsmPrinter();
    LLVMInitializeX86AsmParser();
  });
}

/// Collects what the back end says. LLVM's own handler would end the process at the first error.
class BackEndDiagnostics : public llvm::DiagnosticHandler {
 public:
  BackEndDiagnostics(llvm::raw_ostream& log, bool& failed) : log_(log), failed_(failed) {}

  bool handleDiagnostics(const llvm::DiagnosticInfo& info) override {
    if (info.getSeverity() == llvm::DS_Error) failed_ = true;
    if (info.getSeverity() == llvm::DS_Error || info.getSeverity() == llvm::DS_Warning) {
      llvm::DiagnosticPrinterRawOStream printer(log_);
      info.print(printer);
      log_ << '\n';
    }
    return true;
  }

 private:
  llvm::raw_ostream& log_;
  bool& failed_;
};

llvm::IntrusiveRefCntPtr<llvm::vfs::FileSystem> files_of(const attune_clang_request& request) {
  auto files = llvm::makeIntrusiveRefCnt<llvm::vfs::InMemoryFileSystem>();
  files->setCurrentWorkingDirectory(kRoot);
  const auto add = [&](const attune_clang_file& file) {
    files->addFile(std::string(kRoot) + file.name, 0,
                   llvm::MemoryBuffer::getMemBufferCopy(StringRef(file.text, file.text_size), file.name));
  };
  add(request.source);
  for (size_t i = 0; i < request.header_count; ++i) add(request.headers[i]);
  return files;
}

/// Parses the options. Null after an error.
std::unique_ptr<clang::CompilerInstance> make_compiler(const attune_clang_request& request,
                                                       llvm::raw_ostream& log) {
  llvm::SmallVector<const char*> arguments(request.options, request.options + request.option_count);
  arguments.push_back("-I.");
  arguments.push_back("-emit-llvm-only");
  arguments.push_back(request.source.name);

  auto options = llvm::makeIntrusiveRefCnt<clang::DiagnosticOptions>();
  auto* printer = new clang::TextDiagnosticPrinter(log, options.get());  // owned by `diagnostics`
  auto diagnostics =
      llvm::makeIntrusiveRefCnt<clang::DiagnosticsEngine>(new clang::DiagnosticIDs, options, printer);
  auto invocation = std::make_shared<clang::CompilerInvocation>();
  if (!clang::CompilerInvocation::CreateFromArgs(*invocation, arguments, *diagnostics)) return nullptr;
  invocation->getFrontendOpts().DisableFree = false;      // the process outlives the compilation
  invocation->getCodeGenOpts().DisableLLVMPasses = true;  // timed on their own below

  auto compiler = std::make_unique<clang::CompilerInstance>();
  compiler->setInvocation(std::move(invocation));
  compiler->setDiagnostics(diagnostics.get());
  compiler->setVerboseOutputStream(std::make_unique<llvm::raw_null_ostream>());
  compiler->createFileManager(files_of(request));
  return compiler;
}

void run_back_end(clang::CompilerInstance& compiler, llvm::Module& module, clang::BackendAction action,
                  std::unique_ptr<llvm::raw_pwrite_stream> out) {
  clang::EmitBackendOutput(compiler.getDiagnostics(), compiler.getHeaderSearchOpts(),
                           compiler.getCodeGenOpts(), compiler.getTargetOpts(), compiler.getLangOpts(),
                           compiler.getTarget().getDataLayoutString(), &module, action,
                           compiler.getFileManager().getVirtualFileSystemPtr(), std::move(out));
}

}  // namespace

bool compile_object(const attune_clang_request& request, attune_clang_result& result, Bytes& object,
                    std::string& log) {
  Stopwatch watch;
  initialise_llvm();
  llvm::raw_string_ostream log_stream(log);
  const auto compiler = make_compiler(request, log_stream);
  if (compiler == nullptr) return false;

  llvm::LLVMContext context;
  clang::EmitLLVMOnlyAction front_end(&context);
  const bool parsed = compiler->ExecuteAction(front_end);
  const std::unique_ptr<llvm::Module> module = front_end.takeModule();
  result.frontend_ms = watch.lap();
  if (!parsed || module == nullptr) return false;

  bool failed = false;
  context.setDiagnosticHandler(std::make_unique<BackEndDiagnostics>(log_stream, failed));
  compiler->getCodeGenOpts().DisableLLVMPasses = false;
  run_back_end(*compiler, *module, clang::Backend_EmitNothing, nullptr);
  result.optimise_ms = watch.lap();

  compiler->getCodeGenOpts().DisableLLVMPasses = true;
  run_back_end(*compiler, *module, clang::Backend_EmitObj,
               std::make_unique<llvm::raw_svector_ostream>(object));
  result.codegen_ms = watch.lap();
  return !failed && !compiler->getDiagnostics().hasErrorOccurred();
}

}  // namespace attune::plugin
