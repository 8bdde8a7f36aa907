// The little that can't be done in Python.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <vector>

// What torch asks for before it lets tensors be on a device. A build without CUDA has none for it.
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());

// Tensors that nobody holds any more. Python asks for them when it likes: called from here, in the middle of
// an error's way up, it would lose the error.
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
