// What Clang and lld refer to but this plugin leaves out: every target but X86, and Polly.
#include <llvm/Passes/PassPlugin.h>

// lld initialises all targets that LLVM was configured with. X86 must come from its archive, so its stub gets
// a name that nobody calls.
#define X86 AttuneUnused
#define DEFINE_STUB(target, part) \
  void LLVMInitialize##target##part() {}
#define STUB(target, part) DEFINE_STUB(target, part)

extern "C" {
#define LLVM_TARGET(target) STUB(target, TargetInfo) STUB(target, Target) STUB(target, TargetMC)
#include <llvm/Config/Targets.def>
#define LLVM_ASM_PRINTER(target) STUB(target, AsmPrinter)
#include <llvm/Config/AsmPrinters.def>
#define LLVM_ASM_PARSER(target) STUB(target, AsmParser)
#include <llvm/Config/AsmParsers.def>
}

// Clang's pass pipeline asks for Polly's passes, which Debian packages as a module of their own.
llvm::PassPluginLibraryInfo getPollyPluginInfo() {
  return {LLVM_PLUGIN_API_VERSION, "absent", LLVM_VERSION_STRING, [](llvm::PassBuilder&) {}};
}
