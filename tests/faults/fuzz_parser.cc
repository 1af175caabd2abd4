// What must hold of zmq_ops/message.h whatever the bytes are. fuzz_parser.py lets libFuzzer choose
// them; test_zmq_ops.py, which defines DESCRIBE, sends its own: (uint32 size, message)* in, a line
// per message out. Both build it with the sanitizers.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "message.h"

namespace {

void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "parser: %s\n", what);
  std::abort();
}

template <typename T>
void Append(std::string* bytes, T value) {
  bytes->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// The bytes of a message of these tensors.
std::string Serialize(const std::vector<zmq_ops::TensorView>& views) {
  std::string bytes;
  Append<int32_t>(&bytes, views.size());
  for (const auto& view : views) {
    Append<int32_t>(&bytes, view.dtype->number);
    Append<int32_t>(&bytes, view.shape.size());
    for (int32_t dim : view.shape) Append<int32_t>(&bytes, dim);
    Append<int64_t>(&bytes, view.nbytes);
    bytes.append(view.data, view.nbytes);
  }
  return bytes;
}

// Parses the bytes, and checks what holds of any. Returns whether they are a message.
bool Check(const char* message, size_t size, std::vector<zmq_ops::TensorView>* views) {
  if (!zmq_ops::ParseMessage(message, size, views).empty()) return false;
  for (const auto& view : *views) {
    Require(view.data >= message && view.nbytes <= size &&
                static_cast<size_t>(view.data - message) <= size - view.nbytes,
            "a tensor is not within its message");
    size_t expected = view.dtype->itemsize;
    for (int32_t dim : view.shape) expected *= dim;
    Require(view.nbytes == expected, "a tensor has not the size of its shape");
    for (size_t i = 0; i < view.nbytes && view.dtype->number == zmq_ops::kBoolNumber; ++i) {
      Require(view.data[i] == 0 || view.data[i] == 1, "a bool is neither 0 nor 1");
    }
  }
  Require(Serialize(*views) == std::string(message, size), "the message has other bytes");
  std::vector<zmq_ops::TensorView> ignored;
  Require(!zmq_ops::ParseMessage(message, size - 1, &ignored).empty(),
          "without its last byte it is still a message");
  return true;
}

}  // namespace

#ifdef DESCRIBE

int main() {
  uint32_t size;
  while (std::fread(&size, 4, 1, stdin) == 1) {
    std::unique_ptr<char[]> message(new char[size]);  // so that a byte too far is seen
    if (std::fread(message.get(), 1, size, stdin) != size) return 1;
    std::vector<zmq_ops::TensorView> views;
    if (!Check(message.get(), size, &views)) {
      std::puts("rejected");
      continue;
    }
    for (const auto& view : views) {
      std::printf("%s", view.dtype->name);
      for (int dim : view.shape) std::printf(",%d", dim);
      std::printf(":");
      for (size_t i = 0; i < view.nbytes; ++i) std::printf("%02x", view.data[i] & 255);
      std::printf(" ");
    }
    std::puts("");
  }
}

#else

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<zmq_ops::TensorView> views;
  Check(reinterpret_cast<const char*>(data), size, &views);
  return 0;
}

#endif
