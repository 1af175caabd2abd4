// The receiver's side of messages in shared memory; shared.py describes them and is the sender's.
#ifndef ZMQ_OPS_SHARED_H_
#define ZMQ_OPS_SHARED_H_

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace zmq_ops {

// What a frame says about a message that lies elsewhere.
struct Reference {
  int32_t mark, pid, memory, released;
  int64_t inode, size;

  // Returns false if the frame is something else.
  bool Read(const char* frame, size_t frame_size) {
    static_assert(sizeof(Reference) == 32, "there must be no padding");
    if (frame_size != sizeof(Reference)) return false;
    std::memcpy(this, frame, sizeof(Reference));
    return mark == -1;
  }
};

// A message in the memory of its sender, mapped as long as this lives.
class SharedMessage {
 public:
  SharedMessage() = default;
  SharedMessage(const SharedMessage&) = delete;
  SharedMessage& operator=(const SharedMessage&) = delete;

  ~SharedMessage() {
    if (data_ != MAP_FAILED) munmap(data_, size_);
    if (released_ >= 0) close(released_);
  }

  // Returns an error, or "".
  std::string Open(const Reference& reference) {
    const std::string folder = "/proc/" + std::to_string(reference.pid) + "/fd/";
    const std::string path = folder + std::to_string(reference.memory);
    const int flags = O_NONBLOCK | O_CLOEXEC | O_NOCTTY;
    // the pipe first: if the memory is the right one, the pipe was that of the same process
    released_ = open((folder + std::to_string(reference.released)).c_str(), O_WRONLY | flags);
    const int memory = released_ < 0 ? -1 : open(path.c_str(), O_RDONLY | flags);
    std::string error;
    struct stat pipe, file;
    if (memory < 0 || fstat(released_, &pipe) != 0 || fstat(memory, &file) != 0) {
      error = std::strerror(errno);
    } else if (!S_ISFIFO(pipe.st_mode) || !S_ISREG(file.st_mode) || reference.size <= 0 ||
               static_cast<int64_t>(file.st_ino) != reference.inode ||
               file.st_size != reference.size) {
      error = "it is something else";
    } else {
      size_ = static_cast<size_t>(reference.size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_SHARED, memory, 0);
      if (data_ == MAP_FAILED) error = std::strerror(errno);
    }
    if (memory >= 0) close(memory);
    return error.empty() ? "" : "cannot open the message in the sender's memory, " + path + ": " +
                                    error;
  }

  // Lets the sender write over it.
  void Release() {
    if (data_ != MAP_FAILED && write(released_, "", 1) < 0) {
      // nobody is there to write over it
    }
  }

  const char* data() const { return static_cast<const char*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = MAP_FAILED;
  size_t size_ = 0;
  int released_ = -1;
};

}  // namespace zmq_ops

#endif  // ZMQ_OPS_SHARED_H_
