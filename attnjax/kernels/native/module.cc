// The door of the library: XLA's call frames to `Call`, every shape and type checked again; threads; the choice of the
// instruction set. Holds no mathematics.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "call.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace attnjax {

#define ATTNJAX_DECLARE(isa)    \
  namespace isa {               \
  extern const Kernels kernels; \
  }
ATTNJAX_DECLARE(portable)
#if defined(ATTNJAX_HAS_avx2)
ATTNJAX_DECLARE(avx2)
#endif
#if defined(ATTNJAX_HAS_avx512)
ATTNJAX_DECLARE(avx512)
#endif
#if defined(ATTNJAX_HAS_avx512_bf16)
ATTNJAX_DECLARE(avx512_bf16)
#endif

namespace {

// What this processor can run, the fastest first.
const std::vector<const Kernels*>& instruction_sets() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> sets;
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(ATTNJAX_HAS_avx512_bf16)
    if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16::kernels);
#endif
#if defined(ATTNJAX_HAS_avx512)
    if (avx512) sets.push_back(&avx512::kernels);
#endif
#if defined(ATTNJAX_HAS_avx2)
    if (avx2) sets.push_back(&avx2::kernels);
#endif
    sets.push_back(&portable::kernels);
    return sets;
  }();
  return found;
}

// One parallel loop. Helpers that come late find no task left, touch nothing of the caller's and go.
struct Job {
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> failed{false};
  int64_t count;
  void (*work)(void*, int64_t);
  void* data;
  std::mutex mutex;
  std::condition_variable finished;
  std::exception_ptr error;

  void help();
};

thread_local Job* current_job = nullptr;

void Job::help() {
  Job* outer = current_job;
  current_job = this;
  for (int64_t task; (task = next.fetch_add(1)) < count;) {
    if (!failed.load(std::memory_order_relaxed)) {
      try {
        work(data, task);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    if (done.fetch_add(1) + 1 == count) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_all();
    }
  }
  current_job = outer;
}

struct Team {
  ffi::ThreadPool* pool;
  int64_t threads;
};

void start(void* state, int64_t count, void (*work)(void*, int64_t), void* data) {
  Team& team = *static_cast<Team*>(state);
  auto job = std::make_shared<Job>();
  job->count = count, job->work = work, job->data = data;
  const int64_t helpers = std::min(team.threads, count) - 1;
  for (int64_t i = 0; i < helpers; i++) team.pool->Schedule([job] { job->help(); });
  job->help();
  for (int spins = 0; job->done.load() < count && spins < 1000; spins++) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(job->mutex);
  job->finished.wait(lock, [&] { return job->done.load() >= count; });
  if (job->error) std::rethrow_exception(job->error);
}

void* reserve(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((bytes + 64) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return memory;
}

struct Scratch {
  void* memory = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(memory); }
};

void* scratch(int64_t bytes) {
  thread_local Scratch own;
  if (own.size < bytes) {
    std::free(own.memory);
    own.memory = nullptr, own.size = 0;
    own.memory = reserve(bytes);
    own.size = bytes;
  }
  return own.memory;
}

void yield() {
  if (current_job && current_job->failed.load()) throw std::runtime_error("another thread failed");
  std::this_thread::yield();
}

using Dimensions = std::vector<int64_t>;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("attnjax: " + what); }

std::string text(const Dimensions& dimensions) {
  std::string all = "[";
  for (size_t i = 0; i < dimensions.size(); i++) all += (i ? ", " : "") + std::to_string(dimensions[i]);
  return all + "]";
}

int64_t times(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) refuse("an array has more than 2^63 elements");
  return product;
}

// Reads operands, attributes and results in their order, and remembers what it made for `Call` to point to.
class Reader {
 public:
  Reader(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes)
      : args_(args), rets_(rets), attributes_(attributes) {
    for (int64_t size : list<int64_t>("batch")) batch_.push_back(size);
    for (int64_t size : batch_) {
      if (size < 0) refuse("batch " + text(batch_) + " has a negative size");
      lanes_ = times(lanes_, size);
    }
  }

  template <class T>
  T value(const char* name) const {
    auto found = attributes_.get<T>(name);
    if (!found.has_value()) refuse(std::string("attribute ") + name + " is missing");
    return *found;
  }

  template <class T>
  ffi::Span<const T> list(const char* name) const {
    return value<ffi::Span<const T>>(name);
  }

  const Dimensions& batch() const { return batch_; }
  int64_t lanes() const { return lanes_; }

  ffi::AnyBuffer next(const char* name) {
    auto buffer = args_.get<ffi::AnyBuffer>(used_++);
    if (!buffer.has_value()) refuse(std::string(name) + " is missing");
    return *buffer;
  }

  ffi::AnyBuffer result(const char* name) {
    auto buffer = rets_.get<ffi::AnyBuffer>(made_++);
    if (!buffer.has_value()) refuse(std::string("the result ") + name + " is missing");
    return **buffer;
  }

  void end() const {
    if (args_.size() != used_)
      refuse("has " + std::to_string(args_.size()) + " operands, expected " + std::to_string(used_));
    if (rets_.size() != made_)
      refuse("has " + std::to_string(rets_.size()) + " results, expected " + std::to_string(made_));
  }

  // The trailing sizes, behind the batch axes.
  Dimensions tail(const ffi::AnyBuffer& buffer, const char* name, size_t count) const {
    auto all = buffer.dimensions();
    if (all.size() != batch_.size() + count)
      refuse(std::string(name) + " has " + std::to_string(all.size()) + " axes, expected " +
             std::to_string(batch_.size() + count));
    return Dimensions(all.begin() + batch_.size(), all.end());
  }

  // An array whose batch axes have size 1 or the batch's, whose other axes have the `wanted` sizes, or 1 where `loose`.
  Array array(const ffi::AnyBuffer& buffer, const char* name, const Dimensions& wanted, bool loose, Type type) {
    Dimensions own = tail(buffer, name, wanted.size());
    int64_t size = 1;
    for (size_t i = 0; i < own.size(); i++) {
      if (own[i] != wanted[i] && !(loose && own[i] == 1))
        refuse(std::string(name) + " is " + text(own) + ", expected " + text(wanted));
      size = times(size, own[i]);
    }
    auto all = buffer.dimensions();
    std::vector<int64_t>& offsets = offsets_.emplace_back(lanes_, 0);
    int64_t stride = size, repeat = lanes_ ? lanes_ : 1;
    Dimensions strides(batch_.size());
    for (size_t i = batch_.size(); i-- > 0;) {
      if (all[i] != batch_[i] && all[i] != 1) refuse(std::string(name) + " has a batch that is not " + text(batch_));
      strides[i] = all[i] == 1 ? 0 : stride;
      stride = times(stride, all[i]);
    }
    for (size_t i = 0; i < batch_.size() && lanes_; i++) {
      repeat /= batch_[i];
      for (int64_t b = 0; b < lanes_; b++) offsets[b] += b / repeat % batch_[i] * strides[i];
    }
    return Array{buffer.untyped_data(), type, offsets.data()};
  }

  // A result [*batch, *sizes], contiguous.
  void* whole(const ffi::AnyBuffer& buffer, const char* name, const Dimensions& sizes, ffi::DataType type) {
    expect(buffer, name, type);
    Array found = array(buffer, name, sizes, false, Type::f32);
    int64_t count = lanes_;
    for (int64_t size : sizes) count = times(count, size);
    if (static_cast<int64_t>(buffer.element_count()) != count) refuse(std::string(name) + " must have the whole batch");
    return found.data;
  }

  static void expect(const ffi::AnyBuffer& buffer, const char* name, ffi::DataType type) {
    if (buffer.element_type() != type) refuse(std::string(name) + " has the wrong type");
  }

  static Type float_type(const ffi::AnyBuffer& buffer, const char* name) {
    switch (buffer.element_type()) {
      case ffi::DataType::F32:
        return Type::f32;
      case ffi::DataType::F64:
        return Type::f64;
      case ffi::DataType::BF16:
        return Type::bf16;
      case ffi::DataType::F16:
        return Type::f16;
      default:
        refuse(std::string(name) + " must hold floats");
    }
  }

 private:
  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  ffi::Dictionary attributes_;
  size_t used_ = 0, made_ = 0;
  Dimensions batch_;
  int64_t lanes_ = 1;
  std::deque<std::vector<int64_t>> offsets_;
};

// The next booleans by query and key.
void read_dense(Reader& reader, Call& c) {
  auto buffer = reader.next("mask array");
  Reader::expect(buffer, "mask array", ffi::DataType::PRED);
  Dimensions own = reader.tail(buffer, "mask array", 3);
  Pairs& pairs = c.dense[c.denses];
  pairs.array = reader.array(buffer, "mask array", {c.heads, c.queries, c.keys}, true, Type::u8);
  pairs.key = own[2] != 1 || c.keys == 1;
  pairs.query = own[1] == 1 ? 0 : own[2];
  pairs.head = own[0] == 1 ? 0 : times(own[1], own[2]);
}

// Integers that all batch entries share.
const int32_t* read_list(Reader& reader, const char* name, int64_t count) {
  auto buffer = reader.next(name);
  Reader::expect(buffer, name, ffi::DataType::S32);
  reader.array(buffer, name, {count}, false, Type::f32);
  if (static_cast<int64_t>(buffer.element_count()) != count) refuse(std::string(name) + " must be without a batch");
  return static_cast<const int32_t*>(buffer.untyped_data());
}

// The next bits by query and key, and which blocks they are of.
void read_bits(Reader& reader, Call& c) {
  auto buffer = reader.next("mask bits");
  Reader::expect(buffer, "mask bits", ffi::DataType::U8);
  const Dimensions own = reader.tail(buffer, "mask bits", 4);
  const int64_t blocks = own[1], bytes = kPackedKeys / 8;
  Packed& packed = c.packed[c.denses];
  Pairs& pairs = c.dense[c.denses];
  packed.rows = own[2];
  if (packed.rows < 1 || own[3] != bytes) refuse("mask bits must be blocks of 64 keys, in 8 bytes");
  if (own[0] != 1 && own[0] != c.heads) refuse("mask bits must be of one head or all");
  pairs.array = reader.array(buffer, "mask bits", own, false, Type::u8);
  pairs.head = own[0] == 1 ? 0 : times(blocks, packed.rows * bytes);
  const int64_t rows = (c.queries + packed.rows - 1) / packed.rows;
  packed.starts = read_list(reader, "mask rows", rows + 1);
  packed.columns = read_list(reader, "mask columns", blocks);
  for (int64_t i = 0; i <= rows; i++)
    if (packed.starts[i] < (i ? packed.starts[i - 1] : 0) || packed.starts[i] > blocks)
      refuse("mask rows must rise from 0 to the number of blocks");
}

void read_mask(Reader& reader, Call& c) {
  int depth = 0;
  for (int64_t code : reader.list<int64_t>("mask")) {
    if (c.steps == kMaxSteps || code < 0 || code > static_cast<int64_t>(MaskStep::negate))
      refuse("the mask's program is wrong");
    const MaskStep step = c.mask[c.steps++] = static_cast<MaskStep>(code);
    if (step < MaskStep::dense) {
      if (c.comparisons == kMaxComparisons) refuse("the mask compares too often");
      auto keys = reader.next("mask keys"), queries = reader.next("mask queries");
      Reader::expect(keys, "mask keys", ffi::DataType::S32);
      Reader::expect(queries, "mask queries", ffi::DataType::S32);
      c.comparison[c.comparisons++] = {step, reader.array(keys, "mask keys", {c.keys}, false, Type::f32),
                                       reader.array(queries, "mask queries", {c.queries}, false, Type::f32)};
      depth++;
    } else if (step <= MaskStep::bits) {
      if (c.denses == kMaxDense) refuse("the mask has too many arrays");
      if (step == MaskStep::bits)
        read_bits(reader, c);
      else
        read_dense(reader, c);
      c.denses++, depth++;
    } else if (step != MaskStep::negate) {
      depth--;
    }
    if (depth < 1 || depth > 8) refuse("the mask's program is wrong");
  }
  if (c.steps && depth != 1) refuse("the mask's program is wrong");
}

// Numbers [lanes, N or 1] of the accumulation type.
Pairs read_by_head(Reader& reader, const Call& c, const char* name) {
  auto buffer = reader.next(name);
  Reader::expect(buffer, name, c.wide ? ffi::DataType::F64 : ffi::DataType::F32);
  Pairs pairs;
  pairs.array = reader.array(buffer, name, {c.heads}, true, c.wide ? Type::f64 : Type::f32);
  pairs.head = reader.tail(buffer, name, 1)[0] == 1 ? 0 : 1;
  return pairs;
}

void read_scores(Reader& reader, Call& c) {
  for (int64_t code : reader.list<int64_t>("scores")) {
    if (c.scores == kMaxScores || code < 0 || code > static_cast<int64_t>(ScoreStep::scale))
      refuse("the scores are wrong");
    Score& score = c.score[c.scores];
    score.step = static_cast<ScoreStep>(code);
    if (score.by_head()) {
      score.pairs = read_by_head(reader, c, score.step == ScoreStep::scale ? "factor" : "soft cap");
    } else {
      auto buffer = reader.next("score array");
      const Type type = Reader::float_type(buffer, "score array");
      Pairs& pairs = score.pairs;
      if (score.step == ScoreStep::bias) {
        Dimensions own = reader.tail(buffer, "bias", 3);
        pairs.array = reader.array(buffer, "bias", {c.heads, c.queries, c.keys}, true, type);
        pairs.key = own[2] != 1 || c.keys == 1;
        pairs.query = own[1] == 1 && c.queries != 1 ? 0 : own[2];
        pairs.head = own[0] == 1 && c.heads != 1 ? 0 : times(own[1], own[2]);
      } else {
        if (type != (c.wide ? Type::f64 : Type::f32)) refuse("a score by distance has the wrong type");
        Dimensions own = reader.tail(buffer, "score by distance", 2);
        const int64_t distances = std::max<int64_t>(c.queries + c.keys - 1, 0);
        pairs.array = reader.array(buffer, "score by distance", {c.heads, distances}, true, type);
        if (own[1] != distances) refuse("a score by distance lacks distances");
        pairs.head = own[0] == 1 ? 0 : own[1];
      }
    }
    c.scores++;
  }
}

// What forward and backward have in common.
Call read_call(Reader& reader) {
  Call c{};
  c.lanes = reader.lanes();
  auto query = reader.next("query"), key = reader.next("key"), value = reader.next("value");
  const Type type = Reader::float_type(query, "query");
  if (Reader::float_type(key, "key") != type || Reader::float_type(value, "value") != type)
    refuse("query, key and value must have one type");
  Dimensions q = reader.tail(query, "query", 3), k = reader.tail(key, "key", 3), v = reader.tail(value, "value", 3);
  c.queries = q[0], c.heads = q[1], c.head_size = q[2];
  c.keys = k[0], c.key_heads = k[1], c.value_size = v[2];
  c.wide = type == Type::f64;
  if (c.head_size < 1 || c.value_size < 1 || c.head_size > 512 || c.value_size > 512)
    refuse("takes head sizes from 1 to 512");
  if (c.key_heads < 1 || c.heads % c.key_heads) refuse("the number of query heads must be a multiple of key heads");
  c.query = reader.array(query, "query", q, false, type);
  c.key = reader.array(key, "key", {c.keys, c.key_heads, c.head_size}, false, type);
  c.value = reader.array(value, "value", {c.keys, c.key_heads, c.value_size}, false, type);
  c.scale = read_by_head(reader, c, "scale");
  c.dropout = reader.value<double>("dropout");
  if (!(c.dropout >= 0 && c.dropout < 1)) refuse("dropout must be in [0, 1)");
  if (reader.value<int64_t>("sinks")) {
    auto sinks = reader.next("sinks");
    Reader::expect(sinks, "sinks", c.wide ? ffi::DataType::F64 : ffi::DataType::F32);
    c.sinks = reader.array(sinks, "sinks", {c.heads}, false, c.wide ? Type::f64 : Type::f32);
  }
  if (c.dropout > 0) {
    auto seeds = reader.next("seeds");
    Reader::expect(seeds, "seeds", ffi::DataType::U32);
    c.seeds = reader.array(seeds, "seeds", {c.heads}, false, Type::f32);
  }
  read_mask(reader, c);
  auto blocks = reader.list<int64_t>("blocks");
  if (blocks.size() == 2) {
    auto kinds = reader.next("block map");
    Reader::expect(kinds, "block map", ffi::DataType::S8);
    c.block_q = blocks[0], c.block_k = blocks[1];
    if (c.block_q < 1 || c.block_k < 1) refuse("blocks must have at least one query and key");
    c.blocks_q = (c.queries + c.block_q - 1) / c.block_q, c.blocks_k = (c.keys + c.block_k - 1) / c.block_k;
    Dimensions own = reader.tail(kinds, "block map", 3);
    c.kinds = reader.array(kinds, "block map", {own[0] == 1 ? 1 : c.heads, c.blocks_q, c.blocks_k}, false, Type::u8);
    c.kinds_by_head = own[0] != 1;
  }
  read_scores(reader, c);
  return c;
}

// Work of less than this many floating-point operations is not worth waking another thread for.
constexpr double kWorthThreads = 4e6;

ffi::Error guarded(ffi::ThreadPool& pool, const Reader& reader, const Call& c, bool backward) {
  const std::string_view wanted = reader.value<std::string_view>("isa");
  const Kernels* kernels = nullptr;
  for (const Kernels* one : instruction_sets())
    if (!kernels && (wanted.empty() || wanted == one->name)) kernels = one;
  if (!kernels) refuse("this processor cannot run " + std::string(wanted));
  const double work = 2.0 * c.lanes * c.heads * c.queries * c.keys * (c.head_size + c.value_size);
  const int64_t most = reader.value<int64_t>("threads"), have = pool.num_threads();
  Team team{&pool, work < kWorthThreads ? 1 : std::max<int64_t>(1, most > 0 ? std::min(most, have) : have)};
  Run run{&team, team.threads, start, scratch, reserve, [](void* memory) { std::free(memory); }, yield};
  (backward ? kernels->backward : kernels->forward)(c, run);
  return ffi::Error::Success();
}

ffi::Error answered(const std::function<ffi::Error()>& body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("attnjax: ") + error.what());
  }
}

std::vector<int64_t> row_starts(const Call& c) {
  std::vector<int64_t> starts(c.lanes);
  for (int64_t b = 0; b < c.lanes; b++) starts[b] = b * c.queries * c.heads * c.value_size;
  return starts;
}

ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
  return answered([&] {
    Reader reader(args, rets, attributes);
    Call c = read_call(reader);
    const auto type = c.wide ? ffi::DataType::F64 : ffi::DataType::F32;
    auto out = reader.result("out");
    if (Reader::float_type(out, "out") != c.query.type) refuse("out has the wrong type");
    c.out = reader.whole(out, "out", {c.queries, c.heads, c.value_size}, out.element_type());
    c.highest = reader.whole(reader.result("highest"), "highest", {c.queries, c.heads}, type);
    c.total = reader.whole(reader.result("total"), "total", {c.queries, c.heads}, type);
    reader.end();
    if (!c.lanes || !c.queries || !c.heads) return ffi::Error::Success();
    return guarded(pool, reader, c, false);
  });
}

ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                    ffi::Dictionary attributes) {
  return answered([&] {
    Reader reader(args, rets, attributes);
    Call c = read_call(reader);
    const auto type = c.wide ? ffi::DataType::F64 : ffi::DataType::F32;
    auto out = reader.next("out");
    if (Reader::float_type(out, "out") != c.query.type) refuse("out has the wrong type");
    c.out = reader.whole(out, "out", {c.queries, c.heads, c.value_size}, out.element_type());
    c.highest = reader.whole(reader.next("highest"), "highest", {c.queries, c.heads}, type);
    c.total = reader.whole(reader.next("total"), "total", {c.queries, c.heads}, type);
    auto d_out = reader.next("cotangent of out");
    if (Reader::float_type(d_out, "cotangent of out") != c.query.type)
      refuse("the cotangent of out has the wrong type");
    c.d_out = reader.whole(d_out, "cotangent of out", {c.queries, c.heads, c.value_size}, d_out.element_type());
    c.d_lse = reader.whole(reader.next("cotangent of lse"), "cotangent of lse", {c.queries, c.heads}, type);
    std::vector<int64_t> rows = row_starts(c);
    c.rows = rows.data();
    auto wanted = reader.list<int64_t>("wanted");
    if (wanted.size() != static_cast<size_t>(4 + c.scores)) refuse("wanted has the wrong length");
    if (wanted[0])
      c.d_query = reader.whole(reader.result("d query"), "d query", {c.queries, c.heads, c.head_size}, type);
    if (wanted[1]) c.d_key = reader.whole(reader.result("d key"), "d key", {c.keys, c.key_heads, c.head_size}, type);
    if (wanted[2])
      c.d_value = reader.whole(reader.result("d value"), "d value", {c.keys, c.key_heads, c.value_size}, type);
    if (wanted[3]) {
      c.d_scale = reader.whole(reader.result("d scale"), "d scale", {c.heads, c.queries}, type);
      std::memset(c.d_scale, 0, c.lanes * c.heads * c.queries * (c.wide ? 8 : 4));
    }
    for (int i = 0; i < c.scores; i++) {
      Score& score = c.score[i];
      if (!wanted[4 + i]) continue;
      auto buffer = reader.result("d score");
      Reader::expect(buffer, "d score", type);
      score.gradient_size = static_cast<int64_t>(buffer.element_count());
      if (score.step == ScoreStep::by_distance) {
        score.gradient = reader.whole(buffer, "d score", {c.heads, std::max<int64_t>(c.queries + c.keys - 1, 0)}, type);
      } else if (score.step == ScoreStep::bias && score.pairs.query && score.pairs.key) {
        const int64_t heads = score.pairs.head ? c.heads : 1;
        score.gradient_pairs.array =
            reader.array(buffer, "d score", {heads, c.queries, c.keys}, false, c.wide ? Type::f64 : Type::f32);
        score.gradient_pairs.key = 1, score.gradient_pairs.query = c.keys;
        score.gradient_pairs.head = heads == 1 ? 0 : times(c.queries, c.keys);
        score.gradient = score.gradient_pairs.array.data;
        const int64_t copies = c.queries && c.keys ? score.gradient_size / (heads * c.queries * c.keys) : 1;
        score.adders = copies ? c.lanes / copies * (heads == 1 ? c.key_heads : 1) : 1;
      } else {
        const bool by_key = score.step == ScoreStep::bias && score.pairs.key;
        score.gradient = reader.whole(buffer, "d score", {c.heads, by_key ? c.keys : c.queries}, type);
      }
    }
    reader.end();
    if (!c.lanes || !c.heads || (!c.queries && !c.keys)) return ffi::Error::Success();
    return guarded(pool, reader, c, true);
  });
}

}  // namespace
}  // namespace attnjax

#define ATTNJAX_EXPORT extern "C" __attribute__((visibility("default")))

XLA_FFI_DEFINE_HANDLER(forward_handler, attnjax::forward,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
XLA_FFI_DEFINE_HANDLER(backward_handler, attnjax::backward,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());

ATTNJAX_EXPORT XLA_FFI_Error* attnjax_forward(XLA_FFI_CallFrame* frame) { return forward_handler(frame); }
ATTNJAX_EXPORT XLA_FFI_Error* attnjax_backward(XLA_FFI_CallFrame* frame) { return backward_handler(frame); }

// The instruction sets that this processor can run, the fastest first, separated by commas.
ATTNJAX_EXPORT const char* attnjax_instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const attnjax::Kernels* one : attnjax::instruction_sets())
      all += (all.empty() ? "" : ",") + std::string(one->name);
    return all;
  }();
  return names.c_str();
}
