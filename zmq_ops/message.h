// The wire format, read without trusting it. No TensorFlow and no ZMQ in here, so that this parser
// can be tested and fuzzed alone.
//
// One message, native byte order, nothing aligned:
//   int32 n, then n times { int32 dtype, int32 ndim, int32 shape[ndim], int64 nbytes, data }
// serialize.py writes it and has a parser that accepts the same messages.
#ifndef ZMQ_OPS_MESSAGE_H_
#define ZMQ_OPS_MESSAGE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace zmq_ops {

struct DType {
  int32_t number;  // TensorFlow's DataType
  const char* name;
  int64_t itemsize;
};

// every type of fixed size that NumPy and TensorFlow share
inline const DType* FindDType(int32_t number) {
  static const DType kDTypes[] = {
      {1, "float32", 4}, {2, "float64", 8},  {3, "int32", 4},        {4, "uint8", 1},
      {5, "int16", 2},   {6, "int8", 1},     {8, "complex64", 8},    {9, "int64", 8},
      {10, "bool", 1},   {17, "uint16", 2},  {18, "complex128", 16}, {19, "float16", 2},
      {22, "uint32", 4}, {23, "uint64", 8},
  };
  for (const DType& dtype : kDTypes) {
    if (dtype.number == number) return &dtype;
  }
  return nullptr;
}

constexpr int32_t kBoolNumber = 10;
constexpr int32_t kMaxDims = 254;       // TensorFlow's limit
constexpr size_t kMinTensorBytes = 16;  // dtype, ndim and nbytes of a 0-d tensor, without its data

// One tensor of a message; `data` points into the message, at any alignment.
struct TensorView {
  const DType* dtype;
  std::vector<int32_t> shape;
  const char* data;
  size_t nbytes;
};

// Reads numbers off the front of a range of bytes, never past its end.
class Reader {
 public:
  Reader(const char* data, size_t size) : data_(data), left_(size) {}

  template <typename T>
  bool Read(T* value) {
    if (left_ < sizeof(T)) return false;
    std::memcpy(value, data_, sizeof(T));  // the bytes are not aligned
    Skip(sizeof(T));
    return true;
  }

  void Skip(size_t count) {
    data_ += count;
    left_ -= count;
  }

  const char* data() const { return data_; }
  size_t left() const { return left_; }

 private:
  const char* data_;
  size_t left_;
};

// Reads one tensor. Returns an error, or "".
inline std::string ParseTensor(Reader* reader, TensorView* tensor) {
  int32_t number, ndim;
  if (!reader->Read(&number) || !reader->Read(&ndim)) return "cut off in its header";
  tensor->dtype = FindDType(number);
  if (tensor->dtype == nullptr) {
    return "unknown dtype number " + std::to_string(number);
  }
  if (ndim < 0 || ndim > kMaxDims) {
    return "ndim " + std::to_string(ndim) + " is not within 0.." + std::to_string(kMaxDims);
  }

  // The product of all dimensions but the zeros must fit int64 even when there is a zero: both
  // TensorFlow and NumPy multiply from left to right and give up on an overflow before the zero.
  if (reader->left() < sizeof(int32_t) * ndim) return "cut off in its shape";
  int64_t nonzero_bytes = tensor->dtype->itemsize;
  bool empty = false;
  tensor->shape.resize(ndim);
  for (int32_t& dim : tensor->shape) {
    reader->Read(&dim);
    if (dim < 0) return "negative dimension " + std::to_string(dim);
    if (dim == 0) {
      empty = true;
    } else if (nonzero_bytes > std::numeric_limits<int64_t>::max() / dim) {
      return "shape too large";
    } else {
      nonzero_bytes *= dim;
    }
  }

  // the data
  const int64_t expected = empty ? 0 : nonzero_bytes;
  int64_t nbytes;
  if (!reader->Read(&nbytes)) return "cut off in its number of bytes";
  if (nbytes != expected) {
    return "announces " + std::to_string(nbytes) + " bytes of data, but its shape and dtype make " +
           std::to_string(expected);
  }
  if (static_cast<uint64_t>(nbytes) > reader->left()) {
    return "needs " + std::to_string(nbytes) + " bytes of data, but the message has " +
           std::to_string(reader->left()) + " left";
  }
  tensor->data = reader->data();
  tensor->nbytes = static_cast<size_t>(nbytes);
  reader->Skip(tensor->nbytes);

  if (number == kBoolNumber) {
    for (size_t i = 0; i < tensor->nbytes; ++i) {
      // a C++ bool that is neither 0 nor 1 is undefined behaviour in whoever reads it
      if (static_cast<unsigned char>(tensor->data[i]) > 1) return "a bool is neither 0 nor 1";
    }
  }
  return "";
}

// Finds the tensors of a message. The views are valid as long as the message is.
// Returns an error, or "".
inline std::string ParseMessage(const char* message, size_t size,
                                std::vector<TensorView>* tensors) {
  tensors->clear();
  Reader reader(message, size);
  int32_t count;
  if (!reader.Read(&count)) return "shorter than its number of tensors";
  if (count < 0 || static_cast<size_t>(count) > reader.left() / kMinTensorBytes) {
    return "announces " + std::to_string(count) + " tensors, but has " + std::to_string(size) +
           " bytes";
  }
  for (int32_t i = 0; i < count; ++i) {
    tensors->emplace_back();  // one at a time: garbage rarely gets past its first tensor
    const std::string error = ParseTensor(&reader, &tensors->back());
    if (!error.empty()) return "tensor " + std::to_string(i) + ": " + error;
  }
  if (reader.left() != 0) {
    return std::to_string(reader.left()) + " bytes too many at its end";
  }
  return "";
}

}  // namespace zmq_ops

#endif  // ZMQ_OPS_MESSAGE_H_
