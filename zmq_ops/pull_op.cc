// The TensorFlow side of ZMQPullSocket: ZmqPull checks a message against what the graph expects and
// turns it into tensors; ZmqWaited tells how long pulls have waited for messages.
#include <functional>
#include <string>
#include <vector>

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"

#include "message.h"
#include "receiver.h"

// pull.py looks for this text in the file before it lets TensorFlow load it
extern "C" const char zmq_ops_built_for[] =
    "zmq_ops built for TensorFlow <" ZMQ_OPS_TF_VERSION ">";

namespace zmq_ops {

namespace tf = tensorflow;

REGISTER_OP("ZmqPull")
    .Output("tensors: types")
    .Attr("types: list({bool, int8, int16, int32, int64, uint8, uint16, uint32, uint64, half, "
          "float, double, complex64, complex128}) >= 1")
    .Attr("shapes: list(shape) >= 1")
    .Attr("end_points: list(string) >= 1")
    .Attr("hwm: int")
    .Attr("bind: bool")
    .Attr("timeout: float")
    .Attr("container: string = ''")
    .Attr("shared_name: string")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      std::vector<tf::PartialTensorShape> shapes;
      TF_RETURN_IF_ERROR(c->GetAttr("shapes", &shapes));
      if (shapes.size() != static_cast<size_t>(c->num_outputs())) {
        return tf::errors::InvalidArgument("ZmqPull has ", shapes.size(), " shapes for ",
                                           c->num_outputs(), " types");
      }
      for (size_t i = 0; i < shapes.size(); ++i) {
        tf::shape_inference::ShapeHandle shape;
        TF_RETURN_IF_ERROR(c->MakeShapeFromPartialTensorShape(shapes[i], &shape));
        c->set_output(i, shape);
      }
      return tf::Status();
    });

REGISTER_OP("ZmqWaited")
    .Output("seconds: double")
    .Attr("container: string = ''")
    .Attr("shared_name: string")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::ScalarShape);

// Lives in the session's resource manager: all pulls of one ZMQPullSocket share it, and it goes,
// with what it has bound, when the session does.
class PullSocket : public tf::ResourceBase {
 public:
  std::string DebugString() const override { return "ZMQPullSocket"; }
  Receiver receiver;
};

struct ResourceName {
  tf::Status Read(tf::OpKernelConstruction* ctx) {
    TF_RETURN_IF_ERROR(ctx->GetAttr("container", &container_attr));
    return ctx->GetAttr("shared_name", &shared_name);
  }

  const std::string& container(tf::OpKernelContext* ctx) const {
    return container_attr.empty() ? ctx->resource_manager()->default_container() : container_attr;
  }

  std::string container_attr, shared_name;
};

class ZmqPullOp : public tf::AsyncOpKernel {
 public:
  explicit ZmqPullOp(tf::OpKernelConstruction* ctx) : AsyncOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("types", &types_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("shapes", &shapes_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("end_points", &end_points_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("hwm", &hwm_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("bind", &bind_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("timeout", &timeout_));
    OP_REQUIRES_OK(ctx, name_.Read(ctx));
  }

  void ComputeAsync(tf::OpKernelContext* ctx, DoneCallback done) override {
    PullSocket* socket = nullptr;
    OP_REQUIRES_OK_ASYNC(ctx,
                         ctx->resource_manager()->LookupOrCreate<PullSocket>(
                             name_.container(ctx), name_.shared_name, &socket,
                             [this](PullSocket** created) { return Open(created); }),
                         done);
    tf::core::ScopedUnref unref(socket);
    Receiver* receiver = &socket->receiver;

    // The step's cancellation (session.close() is one) withdraws the request and ends the pull. It
    // is registered under the receiver's lock, thus before the receiver can answer; the answer
    // deregisters it, which waits for a cancellation that is under way.
    tf::CancellationManager* cancellation = ctx->cancellation_manager();
    const tf::CancellationToken token =
        cancellation == nullptr ? tf::CancellationToken() : cancellation->get_cancellation_token();
    const auto cancel = [this, ctx, done]() {
      ctx->SetStatus(tf::errors::Cancelled("pull from ", end_points_[0],
                                           end_points_.size() > 1 ? ", ..." : "",
                                           " was cancelled"));
      done();
    };
    bool admitted = false;
    const auto admit = [&](tf::uint64 id) {
      admitted = cancellation == nullptr ||
                 cancellation->RegisterCallback(token, [receiver, id, cancel]() {
                   if (receiver->Withdraw(id)) cancel();
                 });
      return admitted;
    };
    const auto answer = [this, ctx, done, cancellation, token](const Answer& answer) {
      if (cancellation != nullptr) cancellation->DeregisterCallback(token);
      const tf::Status status = Deliver(ctx, answer);
      if (!status.ok()) ctx->SetStatus(status);
      done();
    };
    if (!receiver->Ask(timeout_, admit, answer) || !admitted) cancel();
  }

 private:
  tf::Status Open(PullSocket** created) {
    PullSocket* socket = new PullSocket;
    const std::string error = socket->receiver.Start(end_points_, hwm_, bind_);
    if (!error.empty()) {
      socket->Unref();
      return tf::errors::FailedPrecondition(error);
    }
    *created = socket;
    return tf::Status();
  }

  // Turns an answer of the receiver into outputs, or into an error that names the end point.
  tf::Status Deliver(tf::OpKernelContext* ctx, const Answer& answer) {
    const std::string prefix = "pull from " + answer.end_point + ": ";
    switch (answer.kind) {
      case Answer::kTimedOut:
        return tf::errors::DeadlineExceeded(prefix, "no message within ", timeout_, " seconds");
      case Answer::kStopped:
        return tf::errors::Cancelled(prefix, "the socket was closed");
      case Answer::kFailed:
        return tf::errors::FailedPrecondition(prefix, std::string(answer.data, answer.size));
      case Answer::kManyFrames:
        return tf::errors::InvalidArgument(prefix, "expected a message of one frame, got several");
      case Answer::kLost:
        return tf::errors::DataLoss(prefix, std::string(answer.data, answer.size));
      case Answer::kMessage:
        break;
    }
    std::vector<TensorView> views;
    const std::string error = ParseMessage(answer.data, answer.size, &views);
    if (!error.empty()) return tf::errors::InvalidArgument(prefix, "malformed message: ", error);
    if (views.size() != types_.size()) {
      return tf::errors::InvalidArgument(prefix, "expected ", types_.size(), " tensors, received ",
                                         views.size());
    }

    // everything is checked before anything is allocated
    std::vector<tf::TensorShape> shapes(views.size());
    for (size_t i = 0; i < views.size(); ++i) {
      for (const tf::int32 dim : views[i].shape) shapes[i].AddDim(dim);
      if (views[i].dtype->number != types_[i] || !shapes_[i].IsCompatibleWith(shapes[i])) {
        return tf::errors::InvalidArgument(
            prefix, "tensor ", i, ": expected ", FindDType(types_[i])->name, " ",
            shapes_[i].DebugString(), ", received ", views[i].dtype->name, " ",
            shapes[i].DebugString());
      }
    }
    for (size_t i = 0; i < views.size(); ++i) {
      tf::Tensor* output;
      TF_RETURN_IF_ERROR(ctx->allocate_output(i, shapes[i], &output));
      if (views[i].nbytes > 0) {
        std::memcpy(const_cast<char*>(output->tensor_data().data()), views[i].data,
                    views[i].nbytes);
      }
    }
    return tf::Status();
  }

  std::vector<tf::DataType> types_;
  std::vector<tf::PartialTensorShape> shapes_;
  std::vector<std::string> end_points_;
  int hwm_;
  bool bind_;
  float timeout_;
  ResourceName name_;
};

class ZmqWaitedOp : public tf::OpKernel {
 public:
  explicit ZmqWaitedOp(tf::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, name_.Read(ctx));
  }

  void Compute(tf::OpKernelContext* ctx) override {
    tf::Tensor* seconds;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, tf::TensorShape(), &seconds));
    seconds->scalar<double>()() = 0;  // before the first pull there is no socket
    PullSocket* socket = nullptr;
    const tf::Status status = ctx->resource_manager()->Lookup<PullSocket>(
        name_.container(ctx), name_.shared_name, &socket);
    if (!status.ok()) return;
    tf::core::ScopedUnref unref(socket);
    seconds->scalar<double>()() = socket->receiver.waited();
  }

 private:
  ResourceName name_;
};

REGISTER_KERNEL_BUILDER(Name("ZmqPull").Device(tf::DEVICE_CPU), ZmqPullOp);
REGISTER_KERNEL_BUILDER(Name("ZmqWaited").Device(tf::DEVICE_CPU), ZmqWaitedOp);

}  // namespace zmq_ops
