// Who waits for messages: ZMQ PULL sockets and the one thread that reads them, without TensorFlow.
//
// Whoever wants a message queues a request and goes on; the thread answers the requests in order.
// So a pull never blocks a thread of TensorFlow, of which there may be only one, and a request that
// is withdrawn before its answer takes no message away.
#ifndef ZMQ_OPS_RECEIVER_H_
#define ZMQ_OPS_RECEIVER_H_

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

#include "shared.h"

namespace zmq_ops {

struct Answer {
  enum Kind { kMessage, kManyFrames, kLost, kTimedOut, kStopped, kFailed };
  Kind kind;
  const std::string& end_point;  // whose turn it was
  const char* data;              // the message; on kLost and kFailed what went wrong
  size_t size;
};

class Receiver {
 public:
  using Callback = std::function<void(const Answer&)>;

  ~Receiver() { Stop(); }

  // Binds or connects a socket per end point and starts the thread. Returns an error, or "".
  // hwm: messages that may wait in each socket, 0 for no limit, -1 for libzmq's own default.
  std::string Start(const std::vector<std::string>& end_points, int hwm, bool bind);

  // Asks for the next message; messages come from the end points in strict turns.
  //
  // timeout: in seconds from now, <= 0 for none.
  // admit: called at once with the request's id, with the lock held; the request is forgotten
  //   without an answer if it returns false.
  // callback: called once, on the thread, unless the request is withdrawn.
  // Returns false, calling nothing, after Stop.
  bool Ask(double timeout, const std::function<bool(uint64_t)>& admit, Callback callback);

  // Takes a request back. Returns false if it has been answered or is just being answered.
  bool Withdraw(uint64_t id);

  // Total seconds during which a request waited with no message there.
  double waited();

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  struct Request {
    uint64_t id;
    bool has_deadline;
    Clock::time_point deadline;
    Callback callback;
  };

  struct Message {  // freed on every path
    Message() { zmq_msg_init(&frame); }
    ~Message() { zmq_msg_close(&frame); }
    zmq_msg_t frame;
  };

  std::string Open(const std::string& end_point, int hwm, bool bind);
  void Stop();
  void Run();
  bool TryAnswer(Lock* lock);
  void AnswerFront(Lock* lock, Answer::Kind kind, const char* data, size_t size);
  void WaitForNews(Lock* lock);
  void Wake();

  static double Seconds(Clock::duration duration) {
    return std::chrono::duration<double>(duration).count();
  }

  // the thread's own, once it runs
  void* context_ = nullptr;
  std::vector<void*> sockets_;
  std::vector<std::string> end_points_;
  std::vector<std::string> bound_files_;
  size_t turn_ = 0;
  int wake_fd_ = -1;
  std::thread thread_;

  std::mutex mutex_;  // guards what follows
  std::deque<Request> requests_;
  uint64_t next_id_ = 0;
  bool stopped_ = false;
  double waited_ = 0;
  bool waiting_ = false;
  Clock::time_point waiting_since_;
};

// The file of an ipc end point, "" if it has none.
inline std::string IpcFile(const std::string& end_point) {
  const std::string scheme = "ipc://";
  if (end_point.compare(0, scheme.size(), scheme) != 0) return "";
  const std::string file = end_point.substr(scheme.size());
  // @ is Linux's namespace without files, * lets libzmq choose
  return file.empty() || file[0] == '@' || file == "*" ? "" : file;
}

// libzmq removes whatever lies at an ipc path before it binds there, so a second job would silently
// take the place of a first one that is still alive.
inline bool SomebodyListens(const std::string& end_point) {
  const std::string file = IpcFile(end_point);
  sockaddr_un address;
  if (file.empty() || file.size() >= sizeof(address.sun_path)) return false;
  std::memset(&address, 0, sizeof(address));
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, file.c_str());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  const bool connected = connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  close(fd);
  return connected;
}

inline std::string Receiver::Start(const std::vector<std::string>& end_points, int hwm, bool bind) {
  wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  context_ = zmq_ctx_new();
  if (wake_fd_ < 0 || context_ == nullptr) {
    return std::string("cannot start receiving: ") + std::strerror(errno);
  }
  for (const std::string& end_point : end_points) {
    const std::string error = Open(end_point, hwm, bind);
    if (!error.empty()) return error;
  }
  thread_ = std::thread(&Receiver::Run, this);
  return "";
}

inline std::string Receiver::Open(const std::string& end_point, int hwm, bool bind) {
  const std::string prefix =
      std::string("cannot ") + (bind ? "bind " : "connect to ") + end_point + ": ";
  if (bind && SomebodyListens(end_point)) {
    return prefix + "another socket, perhaps of a session not yet closed, listens there";
  }
  void* socket = zmq_socket(context_, ZMQ_PULL);
  if (socket == nullptr) return prefix + zmq_strerror(errno);
  sockets_.push_back(socket);
  end_points_.push_back(end_point);
  const int linger = 0;
  const bool ok =
      zmq_setsockopt(socket, ZMQ_LINGER, &linger, sizeof(linger)) == 0 &&
      (hwm < 0 || zmq_setsockopt(socket, ZMQ_RCVHWM, &hwm, sizeof(hwm)) == 0) &&
      (bind ? zmq_bind(socket, end_point.c_str()) : zmq_connect(socket, end_point.c_str())) == 0;
  if (!ok) return prefix + zmq_strerror(errno);
  if (bind && !IpcFile(end_point).empty()) bound_files_.push_back(IpcFile(end_point));
  return "";
}

inline void Receiver::Stop() {
  {
    Lock lock(mutex_);
    stopped_ = true;
    Wake();
  }
  if (thread_.joinable()) thread_.join();
  for (const std::string& file : bound_files_) unlink(file.c_str());  // libzmq leaves them
  for (void* socket : sockets_) zmq_close(socket);
  if (context_ != nullptr) zmq_ctx_term(context_);
  if (wake_fd_ >= 0) close(wake_fd_);
}

inline bool Receiver::Ask(double timeout, const std::function<bool(uint64_t)>& admit,
                          Callback callback) {
  Lock lock(mutex_);
  if (stopped_) return false;
  const uint64_t id = next_id_++;
  if (!admit(id)) return true;
  Request request{id, timeout > 0, Clock::now(), std::move(callback)};
  if (request.has_deadline) {
    request.deadline +=
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout));
  }
  requests_.push_back(std::move(request));
  Wake();
  return true;
}

inline bool Receiver::Withdraw(uint64_t id) {
  Lock lock(mutex_);
  for (auto it = requests_.begin(); it != requests_.end(); ++it) {
    if (it->id == id) {
      requests_.erase(it);
      Wake();
      return true;
    }
  }
  return false;
}

inline double Receiver::waited() {
  Lock lock(mutex_);
  return waited_ + (waiting_ ? Seconds(Clock::now() - waiting_since_) : 0);
}

inline void Receiver::Wake() {
  const uint64_t one = 1;
  if (wake_fd_ >= 0 && write(wake_fd_, &one, sizeof(one)) < 0) {
    // the counter is full, so that the thread wakes anyway
  }
}

inline void Receiver::Run() {
  Lock lock(mutex_);
  while (!stopped_) {
    if (requests_.empty() || !TryAnswer(&lock)) WaitForNews(&lock);
  }
  while (!requests_.empty()) AnswerFront(&lock, Answer::kStopped, nullptr, 0);
}

// Answers the first request if there is a message, or a reason why there will be none. The lock is
// held while the message is taken, so that nobody can withdraw the request in between.
inline bool Receiver::TryAnswer(Lock* lock) {
  void* socket = sockets_[turn_];
  Message message;
  if (zmq_msg_recv(&message.frame, socket, ZMQ_DONTWAIT) >= 0) {
    Answer::Kind kind = Answer::kMessage;
    while (zmq_msg_more(&message.frame)) {  // its other frames are there already
      kind = Answer::kManyFrames;
      if (zmq_msg_recv(&message.frame, socket, 0) < 0 && errno != EINTR) break;
    }
    const char* data = static_cast<const char*>(zmq_msg_data(&message.frame));
    size_t size = zmq_msg_size(&message.frame);

    // A reference has us open what belongs to this user, so it must not come from the network. Who
    // can make the socket's file can send one: keep it in a folder of your own.
    Reference reference;
    SharedMessage shared;
    std::string error;
    if (kind == Answer::kMessage && reference.Read(data, size) &&
        !IpcFile(end_points_[turn_]).empty()) {
      error = shared.Open(reference);
      kind = error.empty() ? Answer::kMessage : Answer::kLost;
      data = error.empty() ? shared.data() : error.data();
      size = error.empty() ? shared.size() : error.size();
    }
    AnswerFront(lock, kind, data, size);
    shared.Release();
    return true;
  }
  if (errno != EAGAIN && errno != EINTR) {
    const char* error = zmq_strerror(errno);
    AnswerFront(lock, Answer::kFailed, error, std::strlen(error));
    return true;
  }
  if (requests_.front().has_deadline && Clock::now() >= requests_.front().deadline) {
    AnswerFront(lock, Answer::kTimedOut, nullptr, 0);
    return true;
  }
  return false;
}

inline void Receiver::AnswerFront(Lock* lock, Answer::Kind kind, const char* data, size_t size) {
  const std::string& end_point = end_points_[turn_];
  // only a message, even a bad one, ends a turn
  if (kind == Answer::kMessage || kind == Answer::kManyFrames || kind == Answer::kLost) {
    turn_ = (turn_ + 1) % sockets_.size();
  }
  const Request request = std::move(requests_.front());
  requests_.pop_front();
  lock->unlock();
  request.callback(Answer{kind, end_point, data, size});
  lock->lock();
}

// Sleeps until a message comes for the first request, its deadline passes, or somebody calls Wake.
inline void Receiver::WaitForNews(Lock* lock) {
  long timeout_ms = -1;
  const bool wanted = !requests_.empty();
  if (wanted) {
    const Request& request = requests_.front();
    if (request.has_deadline) {
      // at most a day, then again: a long has an end
      const double left = Seconds(request.deadline - Clock::now());
      timeout_ms = static_cast<long>(std::ceil(std::min(std::max(left, 0.0), 86400.0) * 1000));
    }
    waiting_ = true;
    waiting_since_ = Clock::now();
  }
  zmq_pollitem_t items[] = {{nullptr, wake_fd_, ZMQ_POLLIN, 0},
                            {sockets_[turn_], 0, ZMQ_POLLIN, 0}};

  lock->unlock();
  zmq_poll(items, wanted ? 2 : 1, timeout_ms);
  uint64_t wakes;
  if ((items[0].revents & ZMQ_POLLIN) && read(wake_fd_, &wakes, sizeof(wakes)) < 0) {
    // nothing to take back
  }
  lock->lock();

  if (wanted) waited_ += Seconds(Clock::now() - waiting_since_);
  waiting_ = false;
}

}  // namespace zmq_ops

#endif  // ZMQ_OPS_RECEIVER_H_
