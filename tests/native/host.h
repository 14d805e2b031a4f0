// XLA's side of the interface, for frames.cc: arrays in the heap, errors, threads, call frames. Knows nothing of
// attention.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

using Sizes = std::vector<int64_t>;
using Index = std::initializer_list<int64_t>;
using Type = XLA_FFI_DataType;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---- Numbers. Those that are written are multiples of 1/64 below 2, which every type holds exactly.

inline int64_t bytes_of(Type type) {
  switch (type) {
    case XLA_FFI_DataType_F64:
      return 8;
    case XLA_FFI_DataType_F32:
    case XLA_FFI_DataType_S32:
    case XLA_FFI_DataType_U32:
      return 4;
    case XLA_FFI_DataType_BF16:
    case XLA_FFI_DataType_F16:
      return 2;
    default:
      return 1;
  }
}

template <class T>
void put(char* to, T x) {
  std::memcpy(to, &x, sizeof(T));
}

template <class T>
T got(const char* from) {
  T x;
  std::memcpy(&x, from, sizeof(T));
  return x;
}

inline uint16_t float16(double x) {
  if (x == 0) return 0;
  if (x != x) return 0x7e00;
  int exponent;
  double fraction = std::frexp(std::fabs(x), &exponent);  // in [0.5, 1)
  return static_cast<uint16_t>((x < 0) << 15 | (exponent + 14) << 10 |
                               static_cast<int>(std::ldexp(fraction, 11) - 1024));
}

inline double from_float16(uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  double size = exponent == 31 ? (fraction ? NAN : kInfinity)
                               : std::ldexp(exponent ? fraction + 1024 : fraction, (exponent ? exponent : 1) - 25);
  return x >> 15 ? -size : size;
}

inline void encode(char* to, Type type, double x) {
  switch (type) {
    case XLA_FFI_DataType_F64:
      return put(to, x);
    case XLA_FFI_DataType_F32:
      return put(to, static_cast<float>(x));
    case XLA_FFI_DataType_S32:
      return put(to, static_cast<int32_t>(x));
    case XLA_FFI_DataType_U32:
      return put(to, static_cast<uint32_t>(x));
    case XLA_FFI_DataType_F16:
      return put(to, float16(x));
    case XLA_FFI_DataType_BF16: {
      const float y = static_cast<float>(x);
      return std::memcpy(to, reinterpret_cast<const char*>(&y) + 2, 2), void();
    }
    default:
      return put(to, static_cast<uint8_t>(x));
  }
}

inline double decode(const char* from, Type type) {
  switch (type) {
    case XLA_FFI_DataType_F64:
      return got<double>(from);
    case XLA_FFI_DataType_F32:
      return got<float>(from);
    case XLA_FFI_DataType_F16:
      return from_float16(got<uint16_t>(from));
    case XLA_FFI_DataType_BF16: {
      float y = 0;
      std::memcpy(reinterpret_cast<char*>(&y) + 2, from, 2);
      return y;
    }
    default:
      return NAN;
  }
}

// ---- Arrays: values, and what the kernel sees of them.

struct Array {
  Type type;
  Sizes sizes;
  std::vector<double> values;
  std::unique_ptr<char[]> data;

  // Indices along axes of size 1 are ignored, as in broadcasting.
  size_t place(Index index) const {
    int64_t at = 0, axis = 0;
    for (int64_t size : sizes) at = at * size + (size == 1 ? 0 : index.begin()[axis]), axis++;
    return static_cast<size_t>(at);
  }
  double operator()(Index index) const { return values[place(index)]; }
  double& operator[](Index index) { return values[place(index)]; }

  void read() {
    for (size_t i = 0; i < values.size(); i++) values[i] = decode(data.get() + i * bytes_of(type), type);
  }
};

// With nothing to fill it, a result: NaN in every type, so that what the kernel leaves out is seen.
inline Array make(Type type, Sizes sizes, const std::function<double(const Sizes&)>& value = nullptr) {
  Array made{type, sizes, {}, nullptr};
  size_t count = 1;
  for (int64_t size : sizes) count *= static_cast<size_t>(size);
  made.values.resize(count);
  made.data.reset(new char[count * bytes_of(type)]);
  std::memset(made.data.get(), 0xff, count * bytes_of(type));
  if (!value) return made;
  Sizes index(sizes.size());
  for (size_t i = 0; i < count; i++) {
    size_t rest = i;
    for (size_t axis = sizes.size(); axis-- > 0; rest /= sizes[axis]) index[axis] = rest % sizes[axis];
    made.values[i] = value(index);
    encode(made.data.get() + i * bytes_of(type), type, made.values[i]);
  }
  return made;
}

// ---- Errors, threads, frames.

struct XLA_FFI_Error {
  std::string message;
};

// Threads that start at once; or, late, when everything is over, as happens in a busy pool.
struct XLA_FFI_ExecutionContext {
  bool late;
  std::mutex mutex;
  std::vector<std::thread> threads;
  std::vector<std::pair<XLA_FFI_Task*, void*>> waiting;

  void schedule(XLA_FFI_Task* task, void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    if (late)
      waiting.emplace_back(task, data);
    else
      threads.emplace_back(task, data);
  }
  ~XLA_FFI_ExecutionContext() {
    for (auto [task, data] : waiting) threads.emplace_back(task, data);
    for (std::thread& thread : threads) thread.join();
  }
};

inline XLA_FFI_Api api() {
  XLA_FFI_Api made = {};
  made.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  made.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  made.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; };
  made.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
    args->message = args->error->message.c_str();
  };
  made.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
  made.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
    args->ctx->schedule(args->task, args->data);
    return nullptr;
  };
  made.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
    *args->num_threads = 3;
    return nullptr;
  };
  return made;
}

struct Attribute {
  XLA_FFI_AttrType kind;
  std::vector<int64_t> integers = {};
  std::vector<double> numbers = {};
  std::string text = {};
};

using Attributes = std::map<std::string, Attribute>;  // in order of their names, as XLA gives them

inline Attribute scalar(int64_t x) { return {XLA_FFI_AttrType_SCALAR, {x}}; }
inline Attribute scalar(double x) { return {XLA_FFI_AttrType_SCALAR, {}, {x}}; }
inline Attribute list(std::vector<int64_t> x) { return {XLA_FFI_AttrType_ARRAY, std::move(x)}; }
inline Attribute text(std::string x) { return {XLA_FFI_AttrType_STRING, {}, {}, std::move(x)}; }

// Calls the kernel and returns its error.
inline std::string call(XLA_FFI_Handler* handler, XLA_FFI_ExecutionContext& context,
                        const std::vector<const Array*>& operands, const std::vector<const Array*>& results,
                        Attributes attributes) {
  std::vector<XLA_FFI_Buffer> buffers;
  buffers.reserve(operands.size() + results.size());
  std::vector<void*> args, rets, values;
  auto buffer = [&](const Array& array) -> void* {
    auto* sizes = const_cast<int64_t*>(array.sizes.data());
    buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, array.type, array.data.get(),
                       static_cast<int64_t>(array.sizes.size()), sizes});
    return &buffers.back();
  };
  for (const Array* array : operands) args.push_back(buffer(*array));
  for (const Array* array : results) rets.push_back(buffer(*array));
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);

  std::vector<XLA_FFI_AttrType> kinds;
  std::vector<XLA_FFI_ByteSpan> names, texts;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<XLA_FFI_Scalar> scalars;
  std::vector<XLA_FFI_Array> arrays;
  for (auto* spans : {&names, &texts}) spans->reserve(attributes.size());
  scalars.reserve(attributes.size()), arrays.reserve(attributes.size());
  for (auto& [name, attribute] : attributes) {
    const bool integer = attribute.numbers.empty();
    void* data = integer ? static_cast<void*>(attribute.integers.data()) : attribute.numbers.data();
    const Type type = integer ? XLA_FFI_DataType_S64 : XLA_FFI_DataType_F64;
    kinds.push_back(attribute.kind);
    names.push_back({name.data(), name.size()});
    name_pointers.push_back(&names.back());
    if (attribute.kind == XLA_FFI_AttrType_STRING) {
      texts.push_back({attribute.text.data(), attribute.text.size()});
      values.push_back(&texts.back());
    } else if (attribute.kind == XLA_FFI_AttrType_SCALAR) {
      scalars.push_back({type, data});
      values.push_back(&scalars.back());
    } else {
      arrays.push_back({type, attribute.integers.size() + attribute.numbers.size(), data});
      values.push_back(&arrays.back());
    }
  }

  const XLA_FFI_Api functions = api();
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &functions, frame.ctx = &context, frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(values.size()), kinds.data(),
                 name_pointers.data(),      values.data()};
  std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
  return error ? error->message : "";
}

// In a thread of its own, whose memory for tiles then is exactly as much as the kernel asks for.
inline std::string call_afresh(XLA_FFI_Handler* handler, XLA_FFI_ExecutionContext& context,
                               const std::vector<const Array*>& operands, const std::vector<const Array*>& results,
                               const Attributes& attributes) {
  std::string error;
  std::thread([&] { error = call(handler, context, operands, results, attributes); }).join();
  return error;
}
