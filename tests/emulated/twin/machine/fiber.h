// Fibers: many stacks on one host thread. ucontext makes the first switch onto a new stack, setjmp and longjmp all later ones,
// because they need no system call.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <ucontext.h>

namespace twin {

// Saves where the caller is in `from` and continues at `to`. Not inlined: a caller must not keep values across it in registers that
// setjmp does not save.
__attribute__((noinline)) inline void switch_fiber(jmp_buf from, jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

struct Fiber {
  jmp_buf point;  // where to continue

  // Prepares `body` to run on `stack` at the first switch to `point`; `body` must not return.
  void start(char* stack, size_t bytes, void (*body)()) {
    ucontext_t context, caller;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    starting = {this, &context, &caller, body};
    makecontext(&context, &Fiber::enter, 0);
    swapcontext(&caller, &context);
  }

 private:
  struct Starting {
    Fiber* fiber;
    ucontext_t* context;
    ucontext_t* caller;
    void (*body)();
  };
  static inline Starting starting;

  static void enter() {
    void (*const body)() = starting.body;
    if (_setjmp(starting.fiber->point) == 0) swapcontext(starting.context, starting.caller);
    body();
  }
};

}  // namespace twin
