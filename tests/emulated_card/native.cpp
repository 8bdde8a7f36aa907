// The parts that need C++.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <vector>

// torch requires a device guard for tensors on a device; a build without CUDA has none for CUDA.
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());

// Tensors without references. Python polls for them: calling it from here, while an exception propagates, would
// lose the exception.
static std::mutex lock;
static std::vector<void*> gone;

extern "C" void let_go(void* managed) {
  std::lock_guard<std::mutex> guard(lock);
  gone.push_back(managed);
}

extern "C" void* next_gone() {
  std::lock_guard<std::mutex> guard(lock);
  if (gone.empty()) return nullptr;
  void* last = gone.back();
  gone.pop_back();
  return last;
}
