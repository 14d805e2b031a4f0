// Plays XLA: calls the compiled kernel with call frames of odd problems, on threads of its own, and compares with the
// plain formula in float64. Made for sanitizers (`make sanitize`): every array has a piece of the heap that is exactly
// its size. Usage: frames <path of libattnjax_cpu.so> [part of a case's name]
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "host.h"

constexpr Type kFloats[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_F64, XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16};

int failures = 0;

void fail(const std::string& where, const std::string& what) {
  if (failures++ < 20) std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
}

// `precise` is the type of the numbers that `found` was computed from.
void compare(const std::string& where, const char* name, Array& found, const Array& wanted, Type precise) {
  found.read();
  double most = 1, error = 0;
  for (double x : wanted.values) most = std::isfinite(x) ? std::fmax(most, std::fabs(x)) : most;
  for (size_t i = 0; i < wanted.values.size(); i++) {
    const double difference = std::fabs(found.values[i] - wanted.values[i]);
    if (found.values[i] != wanted.values[i] && !(difference <= error)) error = difference;  // NaN stays
  }
  const double unit = precise == XLA_FFI_DataType_F64   ? 1e-12
                      : precise == XLA_FFI_DataType_F32 ? 1e-5
                      : precise == XLA_FFI_DataType_F16 ? 1e-3
                                                        : 1e-2;
  if (!(error <= unit * most)) fail(where, std::string(name) + " is off by " + std::to_string(error));
}

// A mask is written in postfix: comparisons of the indices, c causal, w window, p prefix, l lengths, g the last keys,
// and s segments; arrays of booleans d [N, T, S] and D [1, T, 1]; of bits b [N, T, S] and B [1, T, S], v [N, T, S] only
// in blocks that a causal mask visits; and & | ~. Scores: soft caps c [1] and C [N], factors f [1] and F [N]; biases
// b [N, T, S], B [1, T, S], k [N, 1, S], q [1, T, 1], o [1, 1, 1]; by distance d [N], D [1].
struct Case {
  const char* name;
  Sizes batch;
  int64_t T, S, N, K, H, V;
  std::string mask = "", scores = "";
  bool sinks = false;
  double dropout = 0;
  Sizes blocks = {};  // of a block map, where there is one
  double scale = 0.25;
  bool scales = false;  // one for each head
};

const Case kCases[] = {
    {"plain", {2, 1}, 67, 131, 4, 4, 24, 17},
    {"one", {1, 1}, 1, 1, 1, 1, 1, 1},
    {"no keys", {2, 1}, 3, 0, 2, 1, 5, 4, "", "", true},
    {"no queries", {1, 2}, 0, 5, 2, 1, 5, 4, "c", "k", true},
    {"causal, grouped", {1, 2}, 129, 129, 6, 2, 40, 33, "c", "", true},
    {"large logits", {1, 2}, 66, 200, 2, 1, 8, 8, "cp|", "", true, 0, {}, 8},
    {"window, segments", {2, 2}, 70, 150, 3, 3, 16, 16, "cw&s&", "d", false, 0, {48, 40}},
    {"lengths, dropout", {3, 1}, 65, 257, 4, 2, 33, 20, "l", "c", true, 0.3},
    {"booleans", {2, 1}, 37, 83, 4, 2, 12, 9, "dD|p~&", "", false, 0.25},
    {"bits", {1, 2}, 41, 141, 4, 2, 9, 12, "bBg|&", "b"},
    {"bits for all heads", {1, 1}, 35, 300, 2, 1, 8, 8, "Bc|", "Bk"},
    {"bits of some blocks", {1, 2}, 133, 170, 4, 2, 8, 8, "vc&", "f"},
    {"bits, few queries", {2, 1}, 2, 130, 2, 2, 8, 8, "bvc&|", "F"},
    {"every bias", {2, 2}, 19, 135, 4, 2, 8, 8, "c", "bBkqoc"},
    {"caps and scales", {2, 1}, 70, 150, 4, 2, 16, 8, "c", "cFbCdf", true, 0, {64, 128}, 0.25, true},
    {"scales of all heads", {2, 1}, 67, 131, 3, 3, 16, 8, "", "C", false, 0, {}, 0.25, true},
    {"many adders", {5, 2}, 9, 140, 4, 4, 8, 8, "c", "B"},
    {"far apart", {1, 1}, 300, 1400, 2, 1, 8, 8, "gc&", "d"},
    {"distances", {2, 1}, 75, 291, 4, 2, 8, 8, "c", "dDc"},
    {"many spans", {1, 1}, 99, 1100, 2, 1, 16, 16, "w", "Bdq", true},
    {"large heads", {1, 1}, 9, 13, 2, 1, 512, 511, "c"},
    {"one query", {2, 1}, 1, 1300, 8, 2, 40, 33, "l", "kd", true, 0, {}, 0.25, true},
    {"few queries", {1, 2}, 3, 530, 2, 2, 17, 70, "bs|", "cb", false, 0.4},
    {"one head of keys", {1, 1}, 1, 77, 4, 1, 64, 128, "D", "qo"},
};

class Problem {
 public:
  Problem(const Case& c, Type type, unsigned seed) : c_(c), type_(type), wide_(wide(type)), random_(seed) {
    query_ = floats(type, {c.T, c.N, c.H}), key_ = floats(type, {c.S, c.K, c.H}),
    value_ = floats(type, {c.S, c.K, c.V});
    scale_ = make(wide_, batched({c.scales ? c.N : 1}),
                  [&](const Sizes&) { return c.scales ? c.scale + number() / 8 : c.scale; });
    sinks_ = floats(wide_, {c.N});
    seeds_ = make(XLA_FFI_DataType_U32, batched({c.N}), [&](const Sizes&) { return random_(); });
    for (char step : c.mask) add_mask(step);
    for (char step : c.scores) add_score(step);
    if (!c.blocks.empty()) add_kinds();
    spoil();
    d_scale_ = wanted(wide_, {c.N, c.T});
    out_ = wanted(type, {c.T, c.N, c.V}), lse_ = wanted(wide_, {c.T, c.N});
    d_out_ = full(type, {c.T, c.N, c.V}), d_lse_ = full(wide_, {c.T, c.N});
    d_query_ = wanted(wide_, {c.T, c.N, c.H});
    d_key_ = wanted(wide_, {c.S, c.K, c.H}), d_value_ = wanted(wide_, {c.S, c.K, c.V});
    for (size_t b0 = 0; b0 < size_t(c.batch[0]); b0++)
      for (size_t b1 = 0; b1 < size_t(c.batch[1]); b1++)
        for (int64_t n = 0; n < c.N; n++)
          for (int64_t t = 0; t < c.T; t++) solve(b0, b1, n, t);
    given_out_ = make(type, out_.sizes, [this, i = 0](const Sizes&) mutable { return rounded(out_.values[i++]); });
  }

  // Runs the kernel and compares.
  void check(XLA_FFI_Handler* forward, XLA_FFI_Handler* backward, const std::string& isa, bool late) {
    XLA_FFI_ExecutionContext context{late, {}, {}, {}};
    const std::string where = std::string(c_.name) + ", " + isa + ", type " + std::to_string(type_);
    Attributes attributes = this->attributes(isa);
    std::vector<const Array*> operands = this->operands();
    Array out = result(out_), highest = result(lse_), total = result(lse_);
    std::vector<const Array*> results = {&out, &highest, &total};
    std::string error = call_afresh(forward, context, operands, results, attributes);
    if (!error.empty()) return fail(where, error);
    Array lse = result(lse_);
    highest.read(), total.read();
    for (size_t i = 0; i < lse_.values.size(); i++)
      encode(lse.data.get() + i * bytes_of(wide_), wide_, highest.values[i] + std::log(total.values[i]));
    compare(where, "out", out, out_, type_);
    compare(where, "lse", lse, lse_, wide_);
    if (!late) refusals(where, forward, operands, results, attributes);

    operands.insert(operands.end(), {&given_out_, &highest, &total, &d_out_, &d_lse_});
    for (int64_t only = -1; only < (late ? 0 : 3); only++) {  // all gradients, then one alone
      std::vector<std::pair<const char*, const Array*>> expected;
      std::vector<int64_t> flags;
      int64_t number = 0;
      auto want = [&](const char* name, const Array& one, bool may) {
        flags.push_back(may && (only < 0 || only == number % 3));
        if (flags.back()) expected.emplace_back(name, &one);
        number++;
      };
      want("d query", d_query_, true), want("d key", d_key_, true), want("d value", d_value_, true),
          want("d scale", d_scale_, true);
      for (const Array& one : d_scores_) want("d score", one, true);
      attributes["wanted"] = list(flags);
      std::vector<Array> gradients;
      results.clear();
      for (auto [name, one] : expected) gradients.push_back(result(*one));
      for (const Array& one : gradients) results.push_back(&one);
      error = call_afresh(backward, context, operands, results, attributes);
      if (!error.empty()) return fail(where, error);
      for (size_t i = 0; i < expected.size(); i++)
        compare(where, expected[i].first, gradients[i], *expected[i].second, type_);
      if (!late && only < 0) refusals(where, backward, operands, results, attributes);
    }
  }

 private:
  static Type wide(Type type) { return type == XLA_FFI_DataType_F64 ? type : XLA_FFI_DataType_F32; }
  static Array result(const Array& like) { return make(like.type, like.sizes); }

  double number() { return (static_cast<int>(random_() % 256) - 128) / 64.0; }

  Sizes join(Sizes batch, const Sizes& sizes) {
    batch.insert(batch.end(), sizes.begin(), sizes.end());
    return batch;
  }
  // Batch axes of which some have size 1.
  Sizes batched(const Sizes& sizes) {
    return join({random_() % 2 ? c_.batch[0] : 1, random_() % 2 ? c_.batch[1] : 1}, sizes);
  }
  Array floats(Type type, const Sizes& sizes) {
    return make(type, batched(sizes), [&](const Sizes&) { return number(); });
  }
  Array full(Type type, const Sizes& sizes) {
    return make(type, join(c_.batch, sizes), [&](const Sizes&) { return number(); });
  }
  // What is added to while the answer is worked out.
  Array wanted(Type type, const Sizes& sizes) {
    Array made{type, join(c_.batch, sizes), {}, nullptr};
    size_t count = 1;
    for (int64_t size : made.sizes) count *= static_cast<size_t>(size);
    made.values.resize(count);
    return made;
  }

  void add_mask(char step) {
    constexpr Type integer = XLA_FFI_DataType_S32, boolean = XLA_FFI_DataType_PRED, byte = XLA_FFI_DataType_U8;
    auto add = [&](int64_t code, const Sizes& sizes, Type type, std::function<double(const Sizes&)> value) {
      if (code >= 0) codes_.push_back(code);
      masks_.push_back(make(type, batched(sizes), value));
    };
    auto index = [](int64_t shift) { return [shift](const Sizes& i) { return double(i.back() + shift); }; };
    auto any = [&](const Sizes&) { return random_() % 4 ? 1.0 : 0.0; };
    auto bits = [&](const Sizes&) { return random_() % 256; };
    auto up_to = [&](int64_t most) { return [this, most](const Sizes&) { return double(random_() % (most + 1)); }; };
    switch (step) {
      case 'c':
        add(0, {c_.S}, integer, index(0)), add(-1, {c_.T}, integer, index(c_.S - c_.T));
        break;
      case 'w':
        add(4, {c_.S}, integer, index(0)), add(-1, {c_.T}, integer, index(c_.S - c_.T - 20));
        break;
      case 'p':
        add(1, {c_.S}, integer, index(0)), add(-1, {c_.T}, integer, up_to(c_.S));
        break;
      case 'l':
        add(1, {c_.S}, integer, index(0)), add(-1, {c_.T}, integer, up_to(c_.S / 2));
        break;
      case 'g':
        add(3, {c_.S}, integer, index(0)), add(-1, {c_.T}, integer, up_to(c_.S));
        break;
      case 's':
        add(2, {c_.S}, integer, up_to(2)), add(-1, {c_.T}, integer, up_to(2));
        break;
      case 'd':
        add(5, {c_.N, c_.T, c_.S}, boolean, any);
        break;
      case 'D':
        add(5, {1, c_.T, 1}, boolean, any);
        break;
      case 'b':
      case 'B':
      case 'v': {
        const int64_t rows = std::min<int64_t>(step == 'B' ? 64 : 16, c_.T);
        std::vector<int64_t> starts = {0}, columns;
        for (int64_t t = 0; t < c_.T; t += rows, starts.push_back(static_cast<int64_t>(columns.size())))
          for (int64_t s = 0; s < c_.S; s += 64)
            if (step != 'v' || s <= t + rows - 1 + c_.S - c_.T) columns.push_back(s / 64);
        const int64_t blocks = static_cast<int64_t>(columns.size());
        add(6, {step == 'B' ? 1 : c_.N, blocks, rows, 8}, byte, bits);
        for (const auto& numbers : {starts, columns})
          masks_.push_back(make(integer, {1, 1, static_cast<int64_t>(numbers.size())},
                                [&](const Sizes& i) { return double(numbers[i.back()]); }));
        break;
      }
      default:
        codes_.push_back(step == '&' ? 7 : step == '|' ? 8 : 9);
    }
  }

  bool seen(int64_t b0, int64_t b1, int64_t n, int64_t t, int64_t s) const {
    std::vector<bool> stack;
    size_t next = 0;
    for (int64_t code : codes_) {
      if (code < 5) {
        const double k = masks_[next]({b0, b1, s}), q = masks_[next + 1]({b0, b1, t});
        stack.push_back(code == 0 ? k <= q : code == 1 ? k < q : code == 2 ? k == q : code == 3 ? k >= q : k > q);
        next += 2;
      } else if (code == 5) {
        stack.push_back(masks_[next++]({b0, b1, n, t, s}) != 0);
      } else if (code == 6) {
        const Array &bits = masks_[next], &starts = masks_[next + 1], &columns = masks_[next + 2];
        const int64_t rows = bits.sizes[4], row = t / rows;
        bool on = false;
        for (int64_t i = int64_t(starts({0, 0, row})); i < int64_t(starts({0, 0, row + 1})); i++)
          if (int64_t(columns({0, 0, i})) == s / 64)
            on = static_cast<int>(bits({b0, b1, n, i, t % rows, s % 64 / 8})) >> (s % 8) & 1;
        stack.push_back(on);
        next += 3;
      } else if (code == 9) {
        stack.back() = !stack.back();
      } else {
        const bool last = stack.back();
        stack.pop_back();
        stack.back() = code == 7 ? stack.back() && last : stack.back() || last;
      }
    }
    return stack.empty() || stack.back();
  }

  // The block map, with some blocks marked partial that need not be.
  void add_kinds() {
    const bool by_head = c_.mask.find_first_of("dbv") != std::string::npos;
    const int64_t q = c_.blocks[0], k = c_.blocks[1];
    auto kind = [&](const Sizes& i) {
      bool none = true, all = true;
      for (int64_t t = i[3] * q; t < std::min(c_.T, (i[3] + 1) * q); t++)
        for (int64_t s = i[4] * k; s < std::min(c_.S, (i[4] + 1) * k); s++)
          (seen(i[0], i[1], i[2], t, s) ? none : all) = false;
      return random_() % 8 == 0 ? 1.0 : none ? 0.0 : all ? 2.0 : 1.0;
    };
    kinds_ =
        make(XLA_FFI_DataType_S8, join(c_.batch, {by_head ? c_.N : 1, (c_.T + q - 1) / q, (c_.S + k - 1) / k}), kind);
  }

  // NaN in keys and values that nobody sees.
  void spoil() {
    for (int64_t s = 0; s < c_.S; s++) {
      bool some = codes_.empty();
      for (int64_t b0 = 0; b0 < c_.batch[0]; b0++)
        for (int64_t b1 = 0; b1 < c_.batch[1]; b1++)
          for (int64_t n = 0; n < c_.N; n++)
            for (int64_t t = 0; t < c_.T && !some; t++) some = seen(b0, b1, n, t, s);
      for (Array* array : {&key_, &value_}) {
        const int64_t size = array->sizes[3] * array->sizes[4], rows = array->sizes[0] * array->sizes[1];
        for (int64_t i = 0; !some && i < rows * size; i++) {
          const size_t at = static_cast<size_t>((i / size * c_.S + s) * size + i % size);
          array->values[at] = NAN;
          encode(array->data.get() + at * bytes_of(type_), type_, NAN);
        }
      }
    }
  }

  void add_score(char step) {
    const int64_t distances = c_.T + c_.S - 1;
    auto add = [&](Type type, const Sizes& sizes, const Sizes& gradient) {
      scores_.push_back(floats(type, sizes));
      d_scores_.push_back(wanted(wide_, gradient));
    };
    auto bias = [&](int64_t n, int64_t t, int64_t s) {
      add(type_, {n, t, s}, {c_.N, s == c_.S ? c_.S : c_.T});
      if (t == c_.T && s == c_.S) {  // the gradient has the bias's own sizes, batch axes of size 1 as well
        const Array& array = scores_.back();
        d_scores_.back() = Array{wide_, array.sizes, std::vector<double>(array.values.size()), nullptr};
      }
    };
    switch (step) {
      case 'b':
        bias(c_.N, c_.T, c_.S);
        break;
      case 'B':
        bias(1, c_.T, c_.S);
        break;
      case 'k':
        bias(c_.N, 1, c_.S);
        break;
      case 'q':
        bias(1, c_.T, 1);
        break;
      case 'o':
        bias(1, 1, 1);
        break;
      case 'd':
        add(wide_, {c_.N, distances}, {c_.N, distances});
        break;
      case 'D':
        add(wide_, {1, distances}, {c_.N, distances});
        break;
      default:  // caps and factors
        const bool cap = step == 'c' || step == 'C', alone = step == 'C' || step == 'F';
        scores_.push_back(
            make(wide_, batched({alone ? c_.N : 1}), [&](const Sizes&) { return (cap ? 3 : 1) + number() / 4; }));
        d_scores_.push_back(wanted(wide_, {c_.N, c_.T}));
    }
  }

  static uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  bool kept(int64_t b0, int64_t b1, int64_t n, int64_t t, int64_t s) const {
    uint32_t row = mix(static_cast<uint32_t>(seeds_({b0, b1, n})) + static_cast<uint32_t>(t) * 0xC2B2AE3Du);
    return mix(row + static_cast<uint32_t>(s) * 0x27D4EB2Fu) >= std::nearbyint(c_.dropout * 4294967296.0);
  }

  // The output as the backward gets it: one that the type holds exactly.
  static double rounded(double x) { return std::nearbyint(64 * x) / 64; }

  // One row of the answer.
  void solve(int64_t b0, int64_t b1, int64_t n, int64_t t) {
    const int64_t kv = n / (c_.N / c_.K);
    std::vector<double> logits(c_.S), raw(c_.S), weights(c_.S), d_weights(c_.S);
    std::vector<std::vector<double>> before(scores_.size(), logits);
    double highest = c_.sinks ? sinks_({b0, b1, n}) : -kInfinity;
    for (int64_t s = 0; s < c_.S; s++) {
      double x = 0;
      for (int64_t d = 0; d < c_.H; d++) x += query_({b0, b1, t, n, d}) * key_({b0, b1, s, kv, d});
      raw[s] = x, x *= scale_({b0, b1, n});
      for (size_t i = 0; i < scores_.size(); i++) {
        before[i][s] = x;
        if (caps(i)) {
          const double cap = scores_[i]({b0, b1, n});
          x = cap * std::tanh(x / cap);
        } else if (factors(i)) {
          x *= scores_[i]({b0, b1, n});
        } else {
          x += by_distance(i) ? scores_[i]({b0, b1, n, t - s + c_.S - 1}) : scores_[i]({b0, b1, n, t, s});
        }
      }
      logits[s] = seen(b0, b1, n, t, s) ? x : -kInfinity;
      highest = std::fmax(highest, logits[s]);
    }
    double total = c_.sinks ? std::exp(sinks_({b0, b1, n}) - highest) : 0;
    for (double x : logits) total += x == -kInfinity ? 0 : std::exp(x - highest);
    lse_[{b0, b1, t, n}] = highest + std::log(total);
    double delta = -d_lse_({b0, b1, t, n});
    for (int64_t s = 0; s < c_.S; s++) {
      if (logits[s] == -kInfinity) continue;
      weights[s] = std::exp(logits[s] - highest) / total;
      const double keep = c_.dropout == 0 ? 1 : kept(b0, b1, n, t, s) ? 1 / (1 - c_.dropout) : 0;
      for (int64_t v = 0; v < c_.V; v++) {
        const double d_out = d_out_({b0, b1, t, n, v}), value = value_({b0, b1, s, kv, v});
        out_[{b0, b1, t, n, v}] += weights[s] * keep * value;
        d_value_[{b0, b1, s, kv, v}] += weights[s] * keep * d_out;
        d_weights[s] += keep * d_out * value;
      }
    }
    for (int64_t v = 0; v < c_.V; v++) delta += d_out_({b0, b1, t, n, v}) * rounded(out_({b0, b1, t, n, v}));
    for (int64_t s = 0; s < c_.S; s++) {
      if (logits[s] == -kInfinity) continue;
      double change = weights[s] * (d_weights[s] - delta);
      for (size_t i = scores_.size(); i-- > 0;) {
        if (factors(i)) {
          d_scores_[i][{b0, b1, n, t}] += change * before[i][s];
          change *= scores_[i]({b0, b1, n});
          continue;
        }
        if (!caps(i)) {
          d_score(i, b0, b1, n, t, s) += change;
          continue;
        }
        const double part = before[i][s] / scores_[i]({b0, b1, n}), tanh = std::tanh(part), slope = 1 - tanh * tanh;
        d_scores_[i][{b0, b1, n, t}] += change * (tanh - part * slope);
        change *= slope;
      }
      d_scale_[{b0, b1, n, t}] += change * raw[s];
      change *= scale_({b0, b1, n});
      for (int64_t d = 0; d < c_.H; d++) {
        d_query_[{b0, b1, t, n, d}] += change * key_({b0, b1, s, kv, d});
        d_key_[{b0, b1, s, kv, d}] += change * query_({b0, b1, t, n, d});
      }
    }
  }

  bool caps(size_t i) const { return c_.scores[i] == 'c' || c_.scores[i] == 'C'; }
  bool factors(size_t i) const { return c_.scores[i] == 'f' || c_.scores[i] == 'F'; }
  bool by_distance(size_t i) const { return c_.scores[i] == 'd' || c_.scores[i] == 'D'; }
  double& d_score(size_t i, int64_t b0, int64_t b1, int64_t n, int64_t t, int64_t s) {
    if (by_distance(i)) return d_scores_[i][{b0, b1, n, t - s + c_.S - 1}];
    if (d_scores_[i].sizes.size() == 5) return d_scores_[i][{b0, b1, n, t, s}];
    return d_scores_[i][{b0, b1, n, scores_[i].sizes[4] == c_.S ? s : t}];
  }

  std::vector<const Array*> operands() const {
    std::vector<const Array*> all = {&query_, &key_, &value_, &scale_};
    if (c_.sinks) all.push_back(&sinks_);
    if (c_.dropout > 0) all.push_back(&seeds_);
    for (const Array& array : masks_) all.push_back(&array);
    if (!c_.blocks.empty()) all.push_back(&kinds_);
    for (const Array& array : scores_) all.push_back(&array);
    return all;
  }

  Attributes attributes(const std::string& isa) const {
    std::vector<int64_t> steps;
    for (size_t i = 0; i < scores_.size(); i++) steps.push_back(caps(i) ? 0 : by_distance(i) ? 2 : factors(i) ? 3 : 1);
    return {{"batch", list(c_.batch)}, {"dropout", scalar(c_.dropout)}, {"sinks", scalar(int64_t{c_.sinks})},
            {"mask", list(codes_)},    {"blocks", list(c_.blocks)},     {"scores", list(steps)},
            {"isa", text(isa)},        {"threads", scalar(int64_t{0})}};
  }

  // Frames with an array too few, too many or of a wrong size must be refused before anything is read.
  void refusals(const std::string& where, XLA_FFI_Handler* handler, const std::vector<const Array*>& operands,
                const std::vector<const Array*>& results, const Attributes& attributes) const {
    XLA_FFI_ExecutionContext context{false, {}, {}, {}};
    auto refused = [&](const std::vector<const Array*>& some, const std::vector<const Array*>& made, const char* what) {
      if (call(handler, context, some, made, attributes).empty()) fail(where, std::string("not refused: ") + what);
    };
    for (bool result : {false, true}) {
      std::vector<const Array*> own = result ? results : operands;
      auto with = [&](const char* what) { refused(result ? operands : own, result ? own : results, what); };
      own.push_back(own.back());
      with("one array more");
      own.resize(own.size() - 2);
      with("one array less");
      own = result ? results : operands;
      for (const Array*& array : own) {
        const Array* right = array;
        Array wrong{right->type, right->sizes, {}, nullptr};
        wrong.sizes.back() += 1000;
        wrong.data.reset(new char[1]);
        array = &wrong;
        with("a wrong size");
        wrong.sizes = right->sizes, wrong.type = XLA_FFI_DataType_S64;
        with("a wrong type");
        array = right;
      }
    }
  }

  const Case& c_;
  Type type_, wide_;
  std::mt19937 random_;
  Array query_, key_, value_, scale_, d_scale_, sinks_, seeds_, kinds_, out_, given_out_, lse_, d_out_, d_lse_,
      d_query_, d_key_, d_value_;
  std::vector<int64_t> codes_;
  std::vector<Array> masks_, scores_, d_scores_;
};

int main(int count, char** arguments) {
  void* library = dlopen(count > 1 ? arguments[1] : "", RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::fprintf(stderr, "usage: frames <libattnjax_cpu.so> [case]; %s\n", dlerror()), 2;
  auto forward = reinterpret_cast<XLA_FFI_Handler*>(dlsym(library, "attnjax_forward"));
  auto backward = reinterpret_cast<XLA_FFI_Handler*>(dlsym(library, "attnjax_backward"));
  auto sets = reinterpret_cast<const char* (*)()>(dlsym(library, "attnjax_instruction_sets"));
  if (!forward || !backward || !sets) return std::fprintf(stderr, "a function is missing: %s\n", dlerror()), 2;

  unsigned seed = 0;
  int checks = 0;
  for (const Case& c : kCases) {
    for (Type type : kFloats) {
      seed++;
      if (count > 2 && !std::strstr(c.name, arguments[2])) continue;
      Problem problem(c, type, seed);
      std::stringstream names(sets());
      for (std::string isa; std::getline(names, isa, ',');)
        for (bool late : {false, true}) problem.check(forward, backward, isa, late), checks++;
    }
  }
  std::printf("%s: %d checks, %d failures, instruction sets %s\n", arguments[1], checks, failures, sets());
  return failures > 0 || checks == 0;
}
