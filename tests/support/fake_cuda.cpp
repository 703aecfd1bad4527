// What a CPU build of torch lacks before autograd runs over tensors that say they are on CUDA: a device guard, and
// hooks that say that the device is there. Both do nothing, and both are taken away again.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

constexpr auto kCuda = c10::DeviceType::CUDA;
const c10::Stream kStream(c10::Stream::DEFAULT, {kCuda, 0});

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kCuda> {
  c10::Device exchangeDevice(c10::Device) const override { return {kCuda, 0}; }
  c10::Device getDevice() const override { return {kCuda, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface), "one takes the other's place");

}  // namespace

extern "C" void fake_cuda(int on) {
  static const Guard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(kCuda)].store(on ? &guard : nullptr);
  // torch keeps the hooks that it found first, so the object changes its class where it lies.
  void* hooks = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  if (on) {
    new (hooks) Hooks;
  } else {
    new (hooks) at::CUDAHooksInterface;
  }
}
