// The LSTM rule on the CPU: a step, and back-propagation through a run of steps, compiled for one configuration.
//
// Coordinates are worked on in blocks of WIDTH, and everything of a block stays in a core's cache: for a step, its gates;
// for a run, every step's activated gates, cells and inputs, which are computed again rather than kept by the caller.
// Threads take whole groups of blocks. The groups depend on the number of coordinates alone, and their sums are added
// in order, so that the numbers do not depend on the number of threads.
//
// Layouts are those of the rule in Python: rows are features, columns are coordinates; gates in the order input,
// forget, output, candidate. `theta` is one flat vector: dense.weight, dense.bias (with DENSE), then per layer
// lstm.weight [4·HIDDEN, inputs + HIDDEN] and lstm.bias, then output.weight [OUTPUTS, HIDDEN] and output.bias.
//
// Set by the compiler's command line: HIDDEN, LAYERS, DENSE (0 for none), FEATURES, OUTPUT_TANH (0 or 1),
// DIRECTIONS: 0 where the one output is the update, else how many directions the update is mixed from, and CONTEXT: how
// many of the features are of the whole parameter tensor and are given. With CONTEXT there is one more output, and
// weights from the features to it, output.skip [FEATURES], at the end of theta: it makes the mixed step grow or shrink
// from one time to the next. CLIPS (0 or 1): whether the context has one more row, which multiplies the gradient and
// may brake the step. RESTS (0 or 1): whether it has another, which is added to what divides the gradient.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
constexpr int VECTORS = 2;               // registers that hold one row of a block
constexpr int WIDTH = LANES * VECTORS;   // coordinates of a block

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(LANES * sizeof(float)), may_alias));
typedef float Loose __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t Mask __attribute__((vector_size(LANES * sizeof(float)), may_alias));

constexpr bool GROWS = CONTEXT > 0;
constexpr bool TELLS_SIGNAL = CONTEXT > 4;  // the fifth number of the context, by which steps leak
constexpr bool HUSHED = CONTEXT > 5;        // the sixth, by which steps grow less
constexpr int SKIPS = GROWS ? FEATURES : 0, TOLD = CONTEXT + CLIPS + RESTS;
constexpr int OUTPUTS = DIRECTIONS ? DIRECTIONS + 1 + GROWS : 1;
constexpr float MOST_SHRUNK = 12.0f;              // bound of the logarithm that a step has shrunk by
constexpr int ROWS = FEATURES + DIRECTIONS + CLIPS;  // what is computed from the gradients, or given
constexpr int FIRST = DENSE ? DENSE : FEATURES;  // inputs of the first layer
constexpr int GATES = 4 * HIDDEN;
constexpr int inputs_of(int layer) { return layer ? HIDDEN : FIRST; }
constexpr int joined_of(int layer) { return inputs_of(layer) + HIDDEN; }

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }
// Of both NaN in a stays. A comparison and a choice are what the compiler makes of the plain form.
#if defined(__AVX512F__)
inline Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)b, (__m512)a); }
inline Vec smaller(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)b, (__m512)a); }
#elif defined(__AVX__)
inline Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)b, (__m256)a); }
inline Vec smaller(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)b, (__m256)a); }
#else
inline Vec larger(Vec a, Vec b) { return b > a ? b : a; }
inline Vec smaller(Vec a, Vec b) { return b < a ? b : a; }
#endif

inline Vec divide(Vec a, Vec b) {
#ifdef __AVX512F__
  // An estimate of 1/b and one Newton step: a third of the time of a division, to the same rounding or nearly so.
  Vec r = (Vec)_mm512_rcp14_ps((__m512)b);
  r = r * (2.0f - b * r);
  Vec q = a * r;
  return q + r * (a - b * q);
#else
  return a / b;
#endif
}

// tanh(x) = p / q to 4e-7 of its value: of degree 9 and 8, fitted on [-9, 9] for the least relative error.
inline void tanh_parts(Vec x, Vec& p, Vec& q) {
  x = smaller(larger(x, splat(-9.0f)), splat(9.0f));
  const Vec u = x * x;
  p = 1.3353412e-08f * u + 2.0608184e-05f;
  p = p * u + 0.0034955345f;
  p = p * u + 0.13380981f;
  p = p * u + 0.99999998f;
  p = p * x;
  q = 7.7760468e-07f * u + 0.00032855463f;
  q = q * u + 0.02587678f;
  q = q * u + 0.46714297f;
  q = q * u + 1.0f;
}

inline Vec tanh_(Vec x) {
  Vec p, q;
  tanh_parts(x, p, q);
  return divide(p, q);
}

// exp(x) - 1 where x <= 0, which is 2 t / (1 - t) with t = tanh(x / 2); x elsewhere.
[[maybe_unused]] inline Vec elu(Vec x) {
  Vec p, q;
  tanh_parts(0.5f * x, p, q);
  const Vec negative = divide(2.0f * p, q - p);
  return x > 0.0f ? x : negative;
}

// x <- 2^x for N vectors, x <= 126, to 2e-7 of its value: the power of the whole part times a polynomial of the rest. Each
// line waits for the one before it, so that vectors go side by side.
template <int N>
inline void exp2_(Vec (&x)[N]) {
#ifdef __AVX512F__
  constexpr float BY[6] = {0.00187757669f, 0.00898933969f, 0.0558263175f, 0.240153611f, 0.693153083f, 0.99999994f};
#else
  constexpr float BY[6] = {0.00132647273f, 0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.0f};
#endif
  Vec rest[N], p[N];
#ifdef __AVX512F__
  for (int k = 0; k < N; ++k) rest[k] = (Vec)_mm512_reduce_ps((__m512)x[k], 0x09);  // x - floor(x)
#else
  for (int k = 0; k < N; ++k) rest[k] = larger(x[k], splat(-126.0f));
  for (int k = 0; k < N; ++k) x[k] = rest[k] + 12582912.0f;  // the nearest whole number, in the lowest bits
  for (int k = 0; k < N; ++k) rest[k] -= x[k] - 12582912.0f;
#endif
  for (int k = 0; k < N; ++k) p[k] = BY[0] * rest[k] + BY[1];
  for (int i = 2; i < 6; ++i)
    for (int k = 0; k < N; ++k) p[k] = p[k] * rest[k] + BY[i];
#ifdef __AVX512F__
  for (int k = 0; k < N; ++k) x[k] = (Vec)_mm512_scalef_ps((__m512)p[k], (__m512)x[k]);
#else
  for (int k = 0; k < N; ++k) x[k] = (Vec)((Mask)p[k] + ((Mask)x[k] << 23));
#endif
}

// exp(x) for |x| <= 80, to 1e-6 of its value where |x| <= 20.
[[maybe_unused]] inline Vec exp_(Vec x) {
  Vec power[1] = {1.44269504f * x};
  exp2_(power);
  return power[0];
}

// Weights of gates are packed with these factors, so that sigmoid and tanh start from a power of two.
constexpr float TO_SIGMOID = -1.44269504f, TO_TANH = 2.0f * TO_SIGMOID;

// x <- 1 / (1 + 2^x) for N vectors, which is sigmoid(y) for x = TO_SIGMOID y; tanh(y) is twice that less 1 for x = TO_TANH y.
template <int N>
inline void sigmoid_of(Vec (&x)[N]) {
  for (int k = 0; k < N; ++k) x[k] = smaller(x[k], splat(126.0f));
  exp2_(x);
  for (int k = 0; k < N; ++k) x[k] += 1.0f;
#ifdef __AVX512F__
  Vec r[N];
  for (int k = 0; k < N; ++k) r[k] = (Vec)_mm512_rcp14_ps((__m512)x[k]);
  for (int k = 0; k < N; ++k) x[k] = r[k] * (2.0f - x[k] * r[k]);
#else
  for (int k = 0; k < N; ++k) x[k] = 1.0f / x[k];
#endif
}

// ---------------------------------------------------------------------------------------------- matrix products

constexpr int best_divisor(int number, int most) {
  for (int d = most; d * 2 > most; --d)
    if (number % d == 0) return d;
  return number < most ? number : most;
}
constexpr int ROWS_AT_ONCE = REGISTERS >= 32 ? 12 : 6;
constexpr int tile_rows(int rows) { return best_divisor(rows, ROWS_AT_ONCE); }

// Packed for `multiply`: tiles of R rows, within a tile column after column. Rows of gates take the factors of their
// activations.
inline float factor(int row) { return row < 3 * HIDDEN ? TO_SIGMOID : TO_TANH; }
template <int M, int K, bool OF_GATES = false>
void pack(const float* a, ptrdiff_t row_stride, ptrdiff_t column_stride, float* out) {
  constexpr int R = tile_rows(M);
  for (int r = 0; r < M; r += R) {
    int rows = M - r < R ? M - r : R;
    for (int k = 0; k < K; ++k)
      for (int i = r; i < r + rows; ++i)
        *out++ = a[i * row_stride + k * column_stride] * (OF_GATES ? factor(i) : 1.0f);
  }
}

template <int R, int K, bool BIAS>
inline void multiply_tile(const float* __restrict a, const float* __restrict bias, const float* __restrict x,
                          float* __restrict out) {
  Vec sum[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = BIAS ? splat(bias[r]) : Vec{};
  for (int k = 0; k < K; ++k) {
    Vec row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = load(x + k * WIDTH + v * LANES);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += a[k * R + r] * row[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) store(out + r * WIDTH + v * LANES, sum[r][v]);
}

// out [M, WIDTH] = a [M, K] x [K, WIDTH] + bias, with a packed.
template <int M, int K, bool BIAS>
inline void multiply(const float* a, const float* bias, const float* x, float* out) {
  constexpr int R = tile_rows(M);
  int r = 0;
  for (; r + R <= M; r += R) multiply_tile<R, K, BIAS>(a + r * K, bias + r, x, out + r * WIDTH);
  if constexpr (M % R != 0) multiply_tile<M % R, K, BIAS>(a + r * K, bias + r, x, out + r * WIDTH);
}

template <int R, int C>
inline void outer_tile(const float* __restrict a, size_t a_step, const float* __restrict b, size_t b_step, int steps,
                       float* __restrict sum, int columns) {
  Vec s[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) s[r][c] = load(sum + (r * columns + c) * LANES);
  for (int t = 0; t < steps; ++t, a += a_step, b += b_step)
    for (int v = 0; v < VECTORS; ++v) {
      Vec right[C];
      for (int c = 0; c < C; ++c) right[c] = load(b + c * WIDTH + v * LANES);
      for (int r = 0; r < R; ++r) {
        Vec left = load(a + r * WIDTH + v * LANES);
        for (int c = 0; c < C; ++c) s[r][c] += left * right[c];
      }
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(sum + (r * columns + c) * LANES, s[r][c]);
}

// sum [M, N, LANES] += a [steps, M, WIDTH] x b [steps, N, WIDTH] transposed, lane by lane.
template <int M, int N>
void outer(const float* a, size_t a_step, const float* b, size_t b_step, int steps, float* sum) {
  constexpr int R = best_divisor(M, 5), C = best_divisor(N, (REGISTERS >= 32 ? 25 : 10) / R);
  for (int r = 0; r < M; r += R) {
    int c = 0;
    const bool whole = r + R <= M;
    for (; c + C <= N; c += C) {
      float* part = sum + (size_t(r) * N + c) * LANES;
      if (whole) outer_tile<R, C>(a + r * WIDTH, a_step, b + c * WIDTH, b_step, steps, part, N);
      else if constexpr (M % R != 0) outer_tile<M % R, C>(a + r * WIDTH, a_step, b + c * WIDTH, b_step, steps, part, N);
    }
    if constexpr (N % C != 0) {
      float* part = sum + (size_t(r) * N + c) * LANES;
      if (whole) outer_tile<R, N % C>(a + r * WIDTH, a_step, b + c * WIDTH, b_step, steps, part, N);
      else if constexpr (M % R != 0)
        outer_tile<M % R, N % C>(a + r * WIDTH, a_step, b + c * WIDTH, b_step, steps, part, N);
    }
  }
}

// --------------------------------------------------------------------------------------------------- the weights

struct Offsets {  // into theta, as floats
  int dense_weight = 0, dense_bias = 0, weight[LAYERS] = {}, bias[LAYERS] = {}, output_weight = 0, output_bias = 0;
  int skip = 0;
  int size = 0;
};
constexpr Offsets offsets() {
  Offsets o;
  if (DENSE) {
    o.dense_bias = DENSE * FEATURES;
    o.size = o.dense_bias + DENSE;
  }
  for (int l = 0; l < LAYERS; ++l) {
    o.weight[l] = o.size;
    o.bias[l] = o.weight[l] + GATES * joined_of(l);
    o.size = o.bias[l] + GATES;
  }
  o.output_weight = o.size;
  o.output_bias = o.size + OUTPUTS * HIDDEN;
  o.size += OUTPUTS * (HIDDEN + 1);
  o.skip = o.size;
  o.size += SKIPS;
  return o;
}
constexpr Offsets AT = offsets();

constexpr int WIDEST = FIRST > HIDDEN ? FIRST : HIDDEN;

struct Weights {
  float dense[DENSE * FEATURES + 1], dense_bias[DENSE + 1];
  float forward[LAYERS][GATES * (WIDEST + HIDDEN)];
  float bias[LAYERS][GATES];
  float backward[LAYERS][GATES * (WIDEST + HIDDEN)];
  float output[OUTPUTS * HIDDEN], output_bias[OUTPUTS], skip[SKIPS + 1];
};

void fill(Weights& w, const float* theta) {
  if constexpr (DENSE != 0) {
    pack<DENSE ? DENSE : 1, FEATURES>(theta, FEATURES, 1, w.dense);
    std::memcpy(w.dense_bias, theta + AT.dense_bias, DENSE * sizeof(float));
  }
  for (int l = 0; l < LAYERS; ++l) {
    const float* weight = theta + AT.weight[l];
    const int joined = joined_of(l);
    for (int r = 0; r < GATES; ++r) w.bias[l][r] = theta[AT.bias[l] + r] * factor(r);
    if (l == 0) {
      pack<GATES, joined_of(0), true>(weight, joined, 1, w.forward[l]);
      pack<joined_of(0), GATES>(weight, 1, joined, w.backward[l]);
    } else {
      pack<GATES, joined_of(1), true>(weight, joined, 1, w.forward[l]);
      pack<joined_of(1), GATES>(weight, 1, joined, w.backward[l]);
    }
  }
  std::memcpy(w.output, theta + AT.output_weight, sizeof w.output);
  std::memcpy(w.output_bias, theta + AT.output_bias, sizeof w.output_bias);
  std::memcpy(w.skip, theta + AT.skip, SKIPS * sizeof(float));
}

// ------------------------------------------------------------------------------------------------- what a rule sees

enum Kind { GIVEN = 0, NORMALIZED = 1, LOG_AND_SIGN = 2, MOMENTA = 3 };
constexpr int MOST_M = 3, MOST_V = 3;  // moving averages of gradients and of their squares

struct Inputs {
  int kind;
  const float* grads;      // [steps, ld], or [steps, ROWS, ld] where given
  ptrdiff_t ld;            // from one row to the next
  const float *m, *v;      // [1, state_ld] each, NORMALIZED; [3, state_ld] and [2 or 3, state_ld], MOMENTA
  ptrdiff_t state_ld;
  const float* step;       // [n] or [1]
  int shared_step;
  const double* betas;     // of the averages of gradients, then of squares: 1 - beta must not cancel
  float ratio;             // MOMENTA: the most that the average square may be of the recent one
  float eps, range;
  const unsigned char* active;  // [steps, n], GIVEN
  const float* log_size;   // [state_ld], GROWS: what the step has grown or shrunk by
  float growth, most_grown, leak;  // the most that it changes by in a step, its upper bound, the share it forgets
  float brake, most_braked;  // the power of what clips the gradient that it shrinks by, and bound of what it shrinks to
  const float* context;    // [steps, TOLD, tensors], but for GIVEN; null for zero, and no clipping
  long tensors;
  const int* tensor;       // [n], which tensor a coordinate belongs to; null where there is one
};

struct Averages {  // of one block
  alignas(64) float m[MOST_M][WIDTH], v[MOST_V][WIDTH], step[WIDTH];
};
constexpr int num_m(int kind) { return kind == MOMENTA ? 3 : kind == NORMALIZED ? 1 : 0; }
constexpr int num_v(int kind) { return kind == MOMENTA ? 2 + RESTS : kind == NORMALIZED ? 1 : 0; }

inline void load_row(const float* from, int width, float* to) {
  if (width == WIDTH)
    for (int j = 0; j < WIDTH; j += LANES) store(to + j, *reinterpret_cast<const Loose*>(from + j));
  else
    for (int j = 0; j < WIDTH; ++j) to[j] = j < width ? from[j] : 0.0f;
}
// Rows are far apart, so that the processor does not see the next block coming: it is told. A block's row may lie across
// three cache lines.
template <int WRITE>
inline void fetch_next(const float* row) {
  constexpr int LINE = 64 / sizeof(float);
  for (int j = 0; j < WIDTH; j += LINE) __builtin_prefetch(row + WIDTH + j, WRITE);
  __builtin_prefetch(row + 2 * WIDTH - 1, WRITE);
}
inline void store_row(const float* from, int width, float* to) {
  if (width == WIDTH)
    for (int j = 0; j < WIDTH; j += LANES) *reinterpret_cast<Loose*>(to + j) = load(from + j);
  else std::memcpy(to, from, width * sizeof(float));
}

void load_averages(const Inputs& in, ptrdiff_t column, int width, Averages& a) {
  if (!num_m(in.kind)) return;
  for (int i = 0; i < num_m(in.kind); ++i) load_row(in.m + i * in.state_ld + column, width, a.m[i]);
  for (int i = 0; i < num_v(in.kind); ++i) load_row(in.v + i * in.state_ld + column, width, a.v[i]);
  for (int j = 0; j < WIDTH; ++j) a.step[j] = in.step[in.shared_step ? 0 : column + (j < width ? j : 0)];
}

// 1 - beta^step for every coordinate of a block.
inline void correct(const Averages& a, bool same, double beta, float* __restrict out) {
  const float rate = float(std::log(beta)), first = -std::expm1(rate * a.step[0]);
  for (int j = 0; j < WIDTH; ++j) out[j] = same ? first : -std::expm1(rate * a.step[j]);
}

[[maybe_unused]] inline float squashed(float x) { return x / (1.0f + std::fabs(x)); }

// See `features.bounded_square` in Python.
inline float bounded(float average, float recent, float grad, float ratio) {
  const float most = ratio * recent;
  return (average < most) | (grad == 0.0f) | (recent == 0.0f) ? average : most;
}
// See `features._faded` in Python.
inline float faded(float x, float most) { return std::fabs(x) > most ? most * (most / x) : x; }  // NaN stays

// See `features.momenta` in Python: normalized gradient and momenta are the directions, and what is the same for g and -g
// is the network's input.
inline void momenta(const Inputs& in, const float* __restrict g, const float* __restrict least, bool same, Averages& a,
                    float* __restrict out, float* __restrict active) {
  if constexpr (DIRECTIONS == 4 && FEATURES - CONTEXT == 10) {
    alignas(64) float correction[5][WIDTH];
    for (int i = 0; i < 5; ++i) correct(a, same, in.betas[i], correction[i]);
    float beta[5], rest[5];
    for (int i = 0; i < 5; ++i) {
      beta[i] = float(in.betas[i]);
      rest[i] = float(1.0 - in.betas[i]);
    }
    float* __restrict directions = out + FEATURES * WIDTH;
    for (int j = 0; j < WIDTH; ++j) {
      for (int i = 0; i < 3; ++i) a.m[i][j] = a.m[i][j] * beta[i] + g[j] * rest[i];
      for (int i = 0; i < 2; ++i) a.v[i][j] = a.v[i][j] * beta[3 + i] + g[j] * g[j] * rest[3 + i];
      const bool idle = a.v[0][j] == 0.0f;
      const float average = a.v[0][j] / correction[3][j], recent = a.v[1][j] / correction[4][j];
      const float square = bounded(average, recent, g[j], in.ratio);
      if (RESTS) a.v[2][j] = !idle & (average > a.v[2][j]) ? average : a.v[2][j];
      const float scale = 1.0f / (std::sqrt(idle ? 1.0f : square) + least[j]);
      const float most = idle ? 0.0f : std::sqrt(recent) * scale;
      const float d0 = g[j] * scale, d1 = a.m[0][j] / correction[0][j] * scale,
                  d2 = faded(a.m[1][j] / correction[1][j] * scale, most),
                  d3 = faded(a.m[2][j] / correction[2][j] * scale, most);
      directions[j] = d0;
      directions[WIDTH + j] = d1;
      directions[2 * WIDTH + j] = d2;
      directions[3 * WIDTH + j] = d3;
      out[j] = std::fabs(d1);
      out[WIDTH + j] = std::fabs(d2);
      out[2 * WIDTH + j] = std::fabs(d3);
      out[3 * WIDTH + j] = squashed(d0 * d1);
      out[4 * WIDTH + j] = squashed(d0 * d2);
      out[5 * WIDTH + j] = squashed(d0 * d3);
      out[6 * WIDTH + j] = squashed(d1 * d2);
      out[7 * WIDTH + j] = squashed(d1 * d3);
      out[8 * WIDTH + j] = squashed(d0 * d0);
      out[9 * WIDTH + j] = idle ? 0.0f : (average - recent) / (average + recent);
      active[j] = idle ? 0.0f : 1.0f;
    }
  }
}

// One step's rows [ROWS, WIDTH] of a block and the mask (1 or 0) of the coordinates that may move; the averages
// move on.
void features(const Inputs& in, int t, ptrdiff_t column, int width, Averages& a, float* __restrict out,
              float* __restrict active) {
  if (in.kind == GIVEN) {
    for (int f = 0; f < ROWS; ++f)
      load_row(in.grads + (ptrdiff_t(t) * ROWS + f) * in.ld + column, width, out + f * WIDTH);
    for (int j = 0; j < WIDTH; ++j) active[j] = j < width && in.active[t * in.ld + column + j];
    return;
  }
  alignas(64) float g[WIDTH];
  load_row(in.grads + t * in.ld + column, width, g);
  fetch_next<0>(in.grads + t * in.ld + column);
  if (in.kind == LOG_AND_SIGN) {
    const float least = std::exp(-in.range), largest = std::exp(in.range);
    for (int j = 0; j < WIDTH; ++j) {
      const float size = std::fabs(g[j]);
      // A gradient that is not a number fails both comparisons and stays what it is.
      out[j] = size < least ? -1.0f : std::log(size) / in.range;
      out[WIDTH + j] = size < least ? g[j] * largest : (size > 0 ? std::copysign(1.0f, g[j]) : g[j]);
      active[j] = g[j] != 0.0f;
    }
    return;
  }
  bool same = true;
  for (int j = 0; j < WIDTH; ++j) {
    a.step[j] += 1.0f;
    same = same && a.step[j] == a.step[0];
  }
  if (in.kind == MOMENTA) {
    if constexpr (CLIPS != 0) {
      const float* factors = in.context ? in.context + (ptrdiff_t(t) * TOLD + CONTEXT) * in.tensors : nullptr;
      float* row = out + (ROWS - 1) * WIDTH;
      for (int j = 0; j < WIDTH; ++j) {
        row[j] = !factors || j >= width ? 1.0f : factors[in.tensor ? in.tensor[column + j] : 0];
        g[j] *= row[j];
      }
    }
    alignas(64) float least[WIDTH];
    const float* rests =
        RESTS && in.context ? in.context + (ptrdiff_t(t) * TOLD + CONTEXT + CLIPS) * in.tensors : nullptr;
    for (int j = 0; j < WIDTH; ++j)
      least[j] = in.eps + (!rests || j >= width ? 0.0f : rests[in.tensor ? in.tensor[column + j] : 0]);
    momenta(in, g, least, same, a, out, active);
    for (int c = 0; c < CONTEXT; ++c) {
      const float* values = in.context ? in.context + (ptrdiff_t(t) * TOLD + c) * in.tensors : nullptr;
      float* row = out + (FEATURES - CONTEXT + c) * WIDTH;
      for (int j = 0; j < WIDTH; ++j)
        row[j] = !values || j >= width ? 0.0f : values[in.tensor ? in.tensor[column + j] : 0];
    }
    return;
  }
  alignas(64) float correction[WIDTH];
  const float beta = float(in.betas[0]), rest = float(1.0 - in.betas[0]);
  correct(a, same, in.betas[0], correction);
  for (int j = 0; j < WIDTH; ++j) {
    const float m = a.m[0][j] * beta + g[j] * rest;
    const float v = a.v[0][j] * beta + g[j] * g[j] * rest;
    a.m[0][j] = m;
    a.v[0][j] = v;
    const bool idle = v == 0.0f;  // not a number counts as active, and shows in the update
    const float scale = 1.0f / (std::sqrt(idle ? 1.0f : v / correction[j]) + in.eps);
    out[j] = g[j] * scale;
    out[WIDTH + j] = m / correction[j] * scale;
    active[j] = idle ? 0.0f : 1.0f;
  }
}

// ------------------------------------------------------------------------------------------------------ one block

// The dense layer, written to rows 0 … DENSE - 1 of the first layer's joined inputs.
inline void dense(const Weights& w, const float* x, float* out) {
  if constexpr (DENSE != 0) {
    multiply<DENSE ? DENSE : 1, FEATURES, true>(w.dense, w.dense_bias, x, out);
    for (int i = 0; i < DENSE * WIDTH; i += LANES) store(out + i, elu(load(out + i)));
  } else {
    std::memcpy(out, x, FEATURES * WIDTH * sizeof(float));
  }
}

// Activates gates [4·HIDDEN, WIDTH] in place; new cells, their tanh, and hidden units, each [HIDDEN, WIDTH].
inline void cell(float* __restrict gates, const float* before, float* after, float* tanh_cell, float* hidden) {
  constexpr int SIZE = HIDDEN * WIDTH;
  for (int i = 0; i < SIZE; i += LANES) {
    Vec x[4];
    for (int k = 0; k < 4; ++k) x[k] = load(gates + k * SIZE + i);
    sigmoid_of(x);
    x[3] = 2.0f * x[3] - 1.0f;
    store(after + i, x[1] * load(before + i) + x[0] * x[3]);
    for (int k = 0; k < 4; ++k) store(gates + k * SIZE + i, x[k]);
  }
  constexpr int AT_ONCE = HIDDEN % 2 ? VECTORS : 2 * VECTORS;
  for (int i = 0; i < SIZE; i += AT_ONCE * LANES) {
    Vec x[AT_ONCE];
    for (int k = 0; k < AT_ONCE; ++k) x[k] = TO_TANH * load(after + i + k * LANES);
    sigmoid_of(x);
    for (int k = 0; k < AT_ONCE; ++k) {
      x[k] = 2.0f * x[k] - 1.0f;
      store(tanh_cell + i + k * LANES, x[k]);
      store(hidden + i + k * LANES, load(gates + 2 * SIZE + i + k * LANES) * x[k]);
    }
  }
}

// How log_size changes, for `read_out`. BRAKES: whether any gradient of the block is clipped and brakes, which is rare.
template <bool BRAKES>
inline void grow(const float* directions, const Inputs& in, const float* __restrict active, float* __restrict y,
                 float* __restrict log_size, float* __restrict kept, float* __restrict by_last,
                 float* __restrict by_signal, float* __restrict by_clip) {
  float* __restrict last = y + (OUTPUTS - 1) * WIDTH;
  const float *__restrict loudness = directions - WIDTH, *__restrict signal = directions - (1 + HUSHED) * WIDTH;
  const float* __restrict factor = directions + DIRECTIONS * WIDTH;
  for (int j = 0; j < WIDTH; ++j) {
    const float growth = HUSHED && last[j] > 0.0f ? in.growth * loudness[j] : in.growth;
    const float before = log_size[j], rate = last[j], curve = 1.0f - rate * rate;
    const float weak = TELLS_SIGNAL ? 1.0f - signal[j] : 0.0f, leak = in.leak * weak * weak, keep = 1.0f - leak * curve;
    float grown = keep * before + growth * rate, slope = 0.0f;
    bool bound = false;
    if (BRAKES && (factor[j] < 1.0f) & (grown > -in.most_braked)) {
      const float some = factor[j] > 1e-30f ? factor[j] : 1e-30f;
      grown += in.brake * std::log(some);
      bound = grown < -in.most_braked;
      grown = bound ? -in.most_braked : grown;
      slope = factor[j] > 1e-30f ? in.brake / some : 0.0f;
    }
    const float held = grown > in.most_grown ? in.most_grown : grown < -MOST_SHRUNK ? -MOST_SHRUNK : grown;
    bound |= held != grown;
    if (CLIPS) by_clip[j] = bound ? 0.0f : slope;
    if (TELLS_SIGNAL) by_signal[j] = bound ? 0.0f : 2.0f * in.leak * weak * curve * before;
    if (HUSHED) by_last[j] = !bound && rate > 0.0f ? in.growth * rate : 0.0f;
    last[j] = bound ? 0.0f : curve * (growth + 2.0f * leak * rate * before);
    kept[j] = bound ? 0.0f : keep;
    log_size[j] = active[j] != 0.0f ? held : before;
  }
}

// The outputs [OUTPUTS, WIDTH] of the network, and the update they make, before `scale` unless it is mixed. Mixed: the
// first output is the logarithm of the step's size, held within ±range, the next are the shares of the directions, and
// with GROWS the last changes log_size, which stays as it is where a coordinate may not move. `size` [WIDTH] is what
// the mixture is multiplied by. The features' rows lie before the directions. The last row of y is left as the
// derivative of log_size, `kept` [WIDTH] is the one with respect to log_size before, and `by_last` [WIDTH] the one with
// respect to the last feature, `by_signal` [WIDTH] to the one that tells how strong the signal is, and `by_clip` [WIDTH]
// to what clips the gradient; all are zero where a bound is met.
inline void read_out(const Weights& w, const float* top, const float* directions, const Inputs& in, float scale,
                     const float* __restrict active, float* __restrict y, float* __restrict log_size,
                     float* __restrict kept, float* __restrict by_last, float* __restrict by_signal,
                     float* __restrict by_clip, float* __restrict size, float* __restrict update) {
  for (int o = 0; o < OUTPUTS; ++o)
    for (int v = 0; v < VECTORS; ++v) {
      Vec sum = splat(w.output_bias[o]);
      for (int h = 0; h < HIDDEN; ++h) sum += w.output[o * HIDDEN + h] * load(top + h * WIDTH + v * LANES);
      if (OUTPUT_TANH) sum = smaller(larger(tanh_(sum), splat(-1.0f)), splat(1.0f));
      if (DIRECTIONS && o == 0) sum = tanh_(sum / in.range);  // kept as it is for the way back
      if (GROWS && o == OUTPUTS - 1) {
        for (int f = 0; f < SKIPS; ++f) sum += w.skip[f] * load(directions + (f - SKIPS) * WIDTH + v * LANES);
        sum = tanh_(sum);
      }
      store(y + o * WIDTH + v * LANES, sum);
    }
  if constexpr (DIRECTIONS == 0) {
    for (int j = 0; j < WIDTH; ++j) update[j] = y[j] * scale;
  } else {
    if constexpr (GROWS) {
      bool brakes = false;
      for (int j = 0; j < WIDTH && CLIPS; ++j) brakes |= (directions + DIRECTIONS * WIDTH)[j] < 1.0f;
      if (brakes & (in.brake > 0.0f)) grow<true>(directions, in, active, y, log_size, kept, by_last, by_signal, by_clip);
      else grow<false>(directions, in, active, y, log_size, kept, by_last, by_signal, by_clip);
    }
    for (int i = 0; i < WIDTH; i += LANES) {
      Vec log = in.range * load(y + i);
      if constexpr (GROWS) log += load(log_size + i);
      store(size + i, exp_(log) * scale);
    }
    for (int j = 0; j < WIDTH; ++j) {
      float sum = 0.0f;
      for (int d = 0; d < DIRECTIONS; ++d) sum += y[(d + 1) * WIDTH + j] * directions[d * WIDTH + j];
      update[j] = size[j] * sum;
    }
  }
}

struct StepScratch {
  alignas(64) float joined[LAYERS][(WIDEST + HIDDEN) * WIDTH], gates[GATES * WIDTH], cells[HIDDEN * WIDTH],
      tanh_cell[HIDDEN * WIDTH], top[HIDDEN * WIDTH], x[ROWS * WIDTH], active[WIDTH], y[OUTPUTS * WIDTH],
      log_size[WIDTH], kept[WIDTH], by_last[WIDTH], by_signal[WIDTH], by_clip[WIDTH], size[WIDTH], out[WIDTH];
  Averages averages;
};

struct State {  // hidden and cells [LAYERS, HIDDEN, n], averages and log_size [n]
  float *hidden, *cells, *m, *v, *log_size;
};

// `after` may be where the state is read from.
void step_block(const Weights& w, const Inputs& in, const float* hidden, const float* cells, const State& after,
                ptrdiff_t out_ld, ptrdiff_t column, int width, float scale, float* update, StepScratch& s) {
  const ptrdiff_t ld = in.state_ld;
  load_averages(in, column, width, s.averages);
  features(in, 0, column, width, s.averages, s.x, s.active);
  for (int i = 0; i < num_m(in.kind); ++i) store_row(s.averages.m[i], width, after.m + i * out_ld + column);
  for (int i = 0; i < num_v(in.kind); ++i) store_row(s.averages.v[i], width, after.v + i * out_ld + column);
  dense(w, s.x, s.joined[0]);
  for (int l = 0; l < LAYERS; ++l) {
    float* recurrent = s.joined[l] + inputs_of(l) * WIDTH;
    for (int h = 0; h < HIDDEN; ++h) {
      const ptrdiff_t at = (ptrdiff_t(l) * HIDDEN + h) * ld + column;
      load_row(hidden + at, width, recurrent + h * WIDTH);
      load_row(cells + at, width, s.cells + h * WIDTH);
      fetch_next<0>(hidden + at);
      fetch_next<0>(cells + at);
    }
    if (l == 0) multiply<GATES, joined_of(0), true>(w.forward[l], w.bias[l], s.joined[l], s.gates);
    else multiply<GATES, joined_of(1), true>(w.forward[l], w.bias[l], s.joined[l], s.gates);
    float* above = l + 1 < LAYERS ? s.joined[l + 1] : s.top;
    cell(s.gates, s.cells, s.cells, s.tanh_cell, above);
    for (int h = 0; h < HIDDEN; ++h) {
      const ptrdiff_t at = (ptrdiff_t(l) * HIDDEN + h) * out_ld + column;
      store_row(above + h * WIDTH, width, after.hidden + at);
      store_row(s.cells + h * WIDTH, width, after.cells + at);
      if (after.hidden != hidden) {
        fetch_next<1>(after.hidden + at);
        fetch_next<1>(after.cells + at);
      }
    }
  }
  if (GROWS) load_row(in.log_size + column, width, s.log_size);
  read_out(w, s.top, s.x + FEATURES * WIDTH, in, scale, s.active, s.y, s.log_size, s.kept, s.by_last, s.by_signal,
           s.by_clip, s.size, s.out);
  if (GROWS) store_row(s.log_size, width, after.log_size + column);
  for (int j = 0; j < WIDTH; ++j) s.out[j] = s.active[j] != 0.0f ? s.out[j] : 0.0f;
  store_row(s.out, width, update + column);
}

// Sums over coordinates, one for every lane until the end.
struct Sums {
  alignas(64) float dense[(DENSE * FEATURES + 1) * LANES], dense_bias[(DENSE + 1) * LANES];
  alignas(64) float weight[LAYERS][GATES * (WIDEST + HIDDEN) * LANES], bias[LAYERS][GATES * LANES];
  alignas(64) float output[OUTPUTS * HIDDEN * LANES], output_bias[OUTPUTS * LANES], skip[(SKIPS + 1) * LANES];
};

// The rows of a run of steps that one block keeps; sizes in floats.
struct Tape {
  float *x, *joined[LAYERS], *gates[LAYERS], *cells[LAYERS], *tanh_cell[LAYERS], *top, *y, *update, *size, *active,
      *kept, *by_last, *by_signal, *by_clip;
  static size_t floats(int steps) {
    const size_t t = steps;
    size_t rows = t * ROWS + (t + 1) * HIDDEN + t * (OUTPUTS + 3 + GROWS + TELLS_SIGNAL + HUSHED + CLIPS);
    for (int l = 0; l < LAYERS; ++l) rows += (t + 1) * joined_of(l) + t * GATES + (t + 1) * HIDDEN + t * HIDDEN;
    return rows * WIDTH;
  }
  Tape(float* p, int steps) {
    const size_t t = steps;
    auto take = [&p](size_t rows) {
      float* start = p;
      p += rows * WIDTH;
      return start;
    };
    x = take(t * ROWS);
    top = take((t + 1) * HIDDEN);
    y = take(t * OUTPUTS);
    update = take(t);
    size = take(t);
    active = take(t);
    kept = take(GROWS ? t : 0);
    by_last = take(HUSHED ? t : 0);
    by_signal = take(TELLS_SIGNAL ? t : 0);
    by_clip = take(CLIPS ? t : 0);
    for (int l = 0; l < LAYERS; ++l) {
      joined[l] = take((t + 1) * joined_of(l));
      gates[l] = take(t * GATES);
      cells[l] = take((t + 1) * HIDDEN);
      tanh_cell[l] = take(t * HIDDEN);
    }
  }
};

// Runs a block through steps slot … slot + steps - 1 of the tape again.
void replay(const Weights& w, const Inputs& in, const float* hidden, const float* cells, ptrdiff_t ld, ptrdiff_t column,
            int width, int slot, int steps, float scale, Tape& tape) {
  Averages averages;
  alignas(64) float log_size[WIDTH];
  load_averages(in, column, width, averages);
  if (GROWS) load_row(in.log_size + column, width, log_size);
  for (int l = 0; l < LAYERS; ++l)
    for (int h = 0; h < HIDDEN; ++h) {
      const ptrdiff_t at = (ptrdiff_t(l) * HIDDEN + h) * ld + column;
      load_row(hidden + at, width, tape.joined[l] + (slot * joined_of(l) + inputs_of(l) + h) * WIDTH);
      load_row(cells + at, width, tape.cells[l] + (slot * HIDDEN + h) * WIDTH);
      fetch_next<0>(hidden + at);
      fetch_next<0>(cells + at);
    }
  for (int t = slot; t < slot + steps; ++t) {
    float* x = tape.x + t * ROWS * WIDTH;
    features(in, t - slot, column, width, averages, x, tape.active + t * WIDTH);
    dense(w, x, tape.joined[0] + t * joined_of(0) * WIDTH);
    for (int l = 0; l < LAYERS; ++l) {
      float *joined = tape.joined[l] + t * joined_of(l) * WIDTH, *gates = tape.gates[l] + t * GATES * WIDTH;
      if (l == 0) multiply<GATES, joined_of(0), true>(w.forward[l], w.bias[l], joined, gates);
      else multiply<GATES, joined_of(1), true>(w.forward[l], w.bias[l], joined, gates);
      float* next = joined + (joined_of(l) + inputs_of(l)) * WIDTH;  // the next step's recurrent rows
      cell(gates, tape.cells[l] + t * HIDDEN * WIDTH, tape.cells[l] + (t + 1) * HIDDEN * WIDTH,
           tape.tanh_cell[l] + t * HIDDEN * WIDTH, next);
      float* above = l + 1 < LAYERS ? tape.joined[l + 1] + t * joined_of(l + 1) * WIDTH : tape.top + t * HIDDEN * WIDTH;
      std::memcpy(above, next, HIDDEN * WIDTH * sizeof(float));
    }
    read_out(w, tape.top + t * HIDDEN * WIDTH, x + FEATURES * WIDTH, in, scale, tape.active + t * WIDTH,
             tape.y + t * OUTPUTS * WIDTH, log_size, tape.kept + t * WIDTH, tape.by_last + t * WIDTH,
             tape.by_signal + t * WIDTH, tape.by_clip + t * WIDTH, tape.size + t * WIDTH, tape.update + t * WIDTH);
  }
}

// Derivatives with respect to what a run starts from and is given; null where nobody asks.
struct Outward {
  const float *hidden_in, *cells_in;  // of the state after the run [LAYERS, HIDDEN, ld], or null for zero
  float *hidden_out, *cells_out;      // of the state before it, or null; may be the same places
  float* x_out;                       // of the rows [steps, ROWS, ld], or null
  const float* log_in;                // of log_size [ld] after the run, or null for zero
  float* log_out;                     // of log_size before it, or null; may be the same place
};

// Back through the same steps; gates on the tape become the derivatives with respect to what they are activated from.
void back(const Weights& w, const float* cotangents, ptrdiff_t cotangent_ld, int summed, const Outward& outward,
          ptrdiff_t ld, ptrdiff_t column, int width, int slot, int steps, float range, Tape& tape, Sums& sums,
          float scale) {
  alignas(64) float d_hidden[LAYERS][HIDDEN * WIDTH], d_cell[LAYERS][HIDDEN * WIDTH], d_above[HIDDEN * WIDTH],
      d_joined[(WIDEST + HIDDEN) * WIDTH], later[WIDTH], row[WIDTH], d_log[WIDTH], d_last[WIDTH], d_signal[WIDTH],
      d_clip[WIDTH];
  for (int l = 0; l < LAYERS; ++l)
    for (int h = 0; h < HIDDEN; ++h) {
      const ptrdiff_t at = (ptrdiff_t(l) * HIDDEN + h) * ld + column;
      if (outward.hidden_in) {
        load_row(outward.hidden_in + at, width, d_hidden[l] + h * WIDTH);
        load_row(outward.cells_in + at, width, d_cell[l] + h * WIDTH);
        fetch_next<1>(outward.hidden_in + at);
        fetch_next<1>(outward.cells_in + at);
      } else {
        std::memset(d_hidden[l] + h * WIDTH, 0, WIDTH * sizeof(float));
        std::memset(d_cell[l] + h * WIDTH, 0, WIDTH * sizeof(float));
      }
    }
  std::memset(later, 0, sizeof later);
  std::memset(d_log, 0, sizeof d_log);
  if (GROWS && outward.log_in) load_row(outward.log_in + column, width, d_log);
  for (int t = slot + steps - 1; t >= slot; --t) {
    load_row(cotangents + (t - slot) * cotangent_ld + column, width, row);
    fetch_next<0>(cotangents + (t - slot) * cotangent_ld + column);
    float *y = tape.y + t * OUTPUTS * WIDTH, *active = tape.active + t * WIDTH, *update = tape.update + t * WIDTH;
    const float* size = tape.size + t * WIDTH;
    const float *top = tape.top + t * HIDDEN * WIDTH, *directions = tape.x + (t * ROWS + FEATURES) * WIDTH;
    for (int j = 0; j < WIDTH; ++j) {
      later[j] = summed ? later[j] + row[j] : row[j];
      row[j] = active[j] != 0.0f ? later[j] : 0.0f;
    }
    // The outputs give way to the derivatives with respect to them.
    if constexpr (DIRECTIONS == 0) {
      for (int j = 0; j < WIDTH; ++j) y[j] = row[j] * scale * (OUTPUT_TANH ? 1.0f - y[j] * y[j] : 1.0f);
    } else {
      for (int j = 0; j < WIDTH; ++j) {
        const float d_size = row[j] * update[j];  // of the logarithm of the size
        y[j] = d_size * (1.0f - y[j] * y[j]);
        row[j] *= size[j];
        if constexpr (GROWS) {
          float* __restrict last = y + (OUTPUTS - 1) * WIDTH;
          const float d = d_log[j] + d_size, slope = last[j];
          const bool moves = active[j] != 0.0f;
          last[j] = moves ? d * slope : 0.0f;
          if (TELLS_SIGNAL) d_signal[j] = moves ? d * tape.by_signal[t * WIDTH + j] : 0.0f;
          if (HUSHED) d_last[j] = moves ? d * tape.by_last[t * WIDTH + j] : 0.0f;
          if (CLIPS) d_clip[j] = moves ? d * tape.by_clip[t * WIDTH + j] : 0.0f;
          d_log[j] = moves ? d * tape.kept[t * WIDTH + j] : d;
        }
      }
      if (CLIPS && outward.x_out)
        store_row(d_clip, width, outward.x_out + (ptrdiff_t(t - slot) * ROWS + ROWS - 1) * ld + column);
      for (int d = 0; d < DIRECTIONS; ++d) {
        float* __restrict share = y + (d + 1) * WIDTH;
        if (outward.x_out) {
          alignas(64) float d_direction[WIDTH];
          for (int j = 0; j < WIDTH; ++j) d_direction[j] = row[j] * share[j];
          store_row(d_direction, width, outward.x_out + (ptrdiff_t(t - slot) * ROWS + FEATURES + d) * ld + column);
        }
        for (int j = 0; j < WIDTH; ++j) share[j] = row[j] * directions[d * WIDTH + j];
      }
    }
    outer<OUTPUTS, HIDDEN>(y, 0, top, 0, 1, sums.output);
    for (int o = 0; o < OUTPUTS; ++o) {
      Vec s = load(sums.output_bias + o * LANES);
      for (int v = 0; v < VECTORS; ++v) s += load(y + o * WIDTH + v * LANES);
      store(sums.output_bias + o * LANES, s);
    }
    for (int f = 0; f < SKIPS; ++f) {
      Vec s = load(sums.skip + f * LANES);
      for (int v = 0; v < VECTORS; ++v)
        s += load(y + (OUTPUTS - 1) * WIDTH + v * LANES) * load(directions + (f - SKIPS) * WIDTH + v * LANES);
      store(sums.skip + f * LANES, s);
    }
    for (int h = 0; h < HIDDEN; ++h)
      for (int v = 0; v < VECTORS; ++v) {
        Vec s = {};
        for (int o = 0; o < OUTPUTS; ++o) s += w.output[o * HIDDEN + h] * load(y + o * WIDTH + v * LANES);
        store(d_above + h * WIDTH + v * LANES, s);
      }
    for (int l = LAYERS - 1; l >= 0; --l) {
      float *gates = tape.gates[l] + t * GATES * WIDTH, *th = tape.tanh_cell[l] + t * HIDDEN * WIDTH;
      const float* before = tape.cells[l] + t * HIDDEN * WIDTH;
      for (int i = 0; i < HIDDEN * WIDTH; i += LANES) {
        float *pa = gates + i, *pf = pa + HIDDEN * WIDTH, *po = pf + HIDDEN * WIDTH, *pg = po + HIDDEN * WIDTH;
        const Vec a = load(pa), f = load(pf), o = load(po), g = load(pg), tc = load(th + i);
        const Vec dh = load(d_hidden[l] + i) + load(d_above + i);
        const Vec dc = load(d_cell[l] + i) + dh * o * (1.0f - tc * tc);
        store(pa, dc * g * a * (1.0f - a));
        store(pf, dc * load(before + i) * f * (1.0f - f));
        store(po, dh * tc * o * (1.0f - o));
        store(pg, dc * a * (1.0f - g * g));
        store(d_cell[l] + i, dc * f);
      }
      if (l == 0) multiply<joined_of(0), GATES, false>(w.backward[l], w.bias[l], gates, d_joined);
      else multiply<joined_of(1), GATES, false>(w.backward[l], w.bias[l], gates, d_joined);
      std::memcpy(d_hidden[l], d_joined + inputs_of(l) * WIDTH, HIDDEN * WIDTH * sizeof(float));
      if (l) std::memcpy(d_above, d_joined, HIDDEN * WIDTH * sizeof(float));
    }
    float* d_x = d_joined;
    alignas(64) float through_dense[FEATURES * WIDTH];
    if constexpr (DENSE != 0) {
      const float *activated = tape.joined[0] + t * joined_of(0) * WIDTH, *x = tape.x + t * ROWS * WIDTH;
      for (int i = 0; i < DENSE * WIDTH; i += LANES) {
        const Vec e = load(activated + i);
        store(d_joined + i, load(d_joined + i) * (e > 0.0f ? splat(1.0f) : e + 1.0f));
      }
      outer<DENSE ? DENSE : 1, FEATURES>(d_joined, 0, x, 0, 1, sums.dense);
      for (int h = 0; h < DENSE; ++h) {
        Vec s = load(sums.dense_bias + h * LANES);
        for (int v = 0; v < VECTORS; ++v) s += load(d_joined + h * WIDTH + v * LANES);
        store(sums.dense_bias + h * LANES, s);
      }
      if (outward.x_out) {
        constexpr int R = tile_rows(DENSE ? DENSE : 1);
        for (int f = 0; f < FEATURES; ++f)
          for (int v = 0; v < VECTORS; ++v) {
            Vec s = {};
            for (int h = 0; h < DENSE; ++h) {
              const int tile = h / R * R, rows = DENSE - tile < R ? DENSE - tile : R;
              s += w.dense[tile * FEATURES + f * rows + h - tile] * load(d_joined + h * WIDTH + v * LANES);
            }
            store(through_dense + f * WIDTH + v * LANES, s);
          }
        d_x = through_dense;
      }
    }
    if (outward.x_out)
      for (int f = 0; f < SKIPS; ++f)
        for (int j = 0; j < WIDTH; ++j) d_x[f * WIDTH + j] += w.skip[f] * y[(OUTPUTS - 1) * WIDTH + j];
    if (TELLS_SIGNAL && outward.x_out)
      for (int j = 0; j < WIDTH; ++j) d_x[(FEATURES - 1 - HUSHED) * WIDTH + j] += d_signal[j];
    if (HUSHED && outward.x_out)
      for (int j = 0; j < WIDTH; ++j) d_x[(FEATURES - 1) * WIDTH + j] += d_last[j];
    if (outward.x_out)
      for (int f = 0; f < FEATURES; ++f)
        store_row(d_x + f * WIDTH, width, outward.x_out + (ptrdiff_t(t - slot) * ROWS + f) * ld + column);
  }
  if (GROWS && outward.log_out) store_row(d_log, width, outward.log_out + column);
  if (outward.hidden_out)
    for (int l = 0; l < LAYERS; ++l)
      for (int h = 0; h < HIDDEN; ++h) {
        const ptrdiff_t at = (ptrdiff_t(l) * HIDDEN + h) * ld + column;
        store_row(d_hidden[l] + h * WIDTH, width, outward.hidden_out + at);
        store_row(d_cell[l] + h * WIDTH, width, outward.cells_out + at);
      }
}

// What `back` left in the first `steps` slots of the tape, added to the sums over coordinates.
void accumulate(const Tape& tape, int steps, Sums& sums) {
  for (int l = 0; l < LAYERS; ++l) {
    if (l == 0)
      outer<GATES, joined_of(0)>(tape.gates[l], GATES * WIDTH, tape.joined[l], joined_of(0) * WIDTH, steps,
                                 sums.weight[l]);
    else
      outer<GATES, joined_of(1)>(tape.gates[l], GATES * WIDTH, tape.joined[l], joined_of(1) * WIDTH, steps,
                                 sums.weight[l]);
    for (int r = 0; r < GATES; ++r) {
      Vec s = load(sums.bias[l] + r * LANES);
      for (int t = 0; t < steps; ++t)
        for (int v = 0; v < VECTORS; ++v) s += load(tape.gates[l] + (t * GATES + r) * WIDTH + v * LANES);
      store(sums.bias[l] + r * LANES, s);
    }
  }
}

void reduce(const float* from, int count, float* to) {
  for (int i = 0; i < count; ++i, from += LANES) {
    float part[LANES];
    std::memcpy(part, from, sizeof part);
    for (int half = LANES / 2; half; half /= 2)
      for (int j = 0; j < half; ++j) part[j] += part[j + half];
    to[i] = part[0];
  }
}

void reduce(const Sums& sums, float* out) {  // [AT.size]
  if (DENSE) {
    reduce(sums.dense, DENSE * FEATURES, out + AT.dense_weight);
    reduce(sums.dense_bias, DENSE, out + AT.dense_bias);
  }
  for (int l = 0; l < LAYERS; ++l) {
    reduce(sums.weight[l], GATES * joined_of(l), out + AT.weight[l]);
    reduce(sums.bias[l], GATES, out + AT.bias[l]);
  }
  reduce(sums.output, OUTPUTS * HIDDEN, out + AT.output_weight);
  reduce(sums.output_bias, OUTPUTS, out + AT.output_bias);
  reduce(sums.skip, SKIPS, out + AT.skip);
}

constexpr size_t ALIGNMENT = 64;
constexpr int GROUPS = 32;          // of blocks, at most: what threads share out among themselves
constexpr long GROUP_STEPS = 90;   // blocks x steps that make the sums of one more group worth their while
constexpr int SLOTS = 16;           // blocks that a single step keeps on the tape before they are added up

template <typename T>
T* aligned(size_t count) {
  return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(ALIGNMENT), std::nothrow));
}
void release(void* memory) { ::operator delete(memory, std::align_val_t(ALIGNMENT)); }

}  // namespace

extern "C" {

int lstm_theta_size() { return AT.size; }

long lstm_weights_size() { return sizeof(Weights); }

// Lays the weights of `sets` optimizers, theta [sets, theta_size], out as `lstm_step` reads them.
void lstm_pack(const float* theta, long sets, void* weights) {
  for (long s = 0; s < sets; ++s) fill(static_cast<Weights*>(weights)[s], theta + s * AT.size);
}

// One step of `sets` optimizers, each with `per_set` coordinates of its own: weights of `lstm_pack`, state and grads
// [..., sets * per_set]. The new state goes to the pointers that end in _out, which may be the old ones. Rows of the
// old state are state_ld apart, of the new one out_ld.
void lstm_step(const void* packed, long sets, long per_set, int kind, const float* grads, const float* m, const float* v,
              const float* step, int shared_step, const double* betas, float ratio, float eps, float range,
              float growth, float most_grown, float leak, float brake, float most_braked,
              const float* hidden, const float* cells, const float* log_size, long state_ld, float* m_out, float* v_out,
              float* hidden_out, float* cells_out, float* log_size_out, long out_ld, const float* context, long tensors, const int* tensor, float scale,
              float* update, int threads) {
  const long n = sets * per_set, blocks = (per_set + WIDTH - 1) / WIDTH;
  const Weights* weights = static_cast<const Weights*>(packed);
  const Inputs in{kind, grads, n, m, v, state_ld, step, shared_step, betas, ratio, eps, range, nullptr,
                  log_size, growth, most_grown, leak, brake, most_braked, context, tensors, tensor};
  const State after{hidden_out, cells_out, m_out, v_out, log_size_out};
#pragma omp parallel num_threads(threads) if (threads > 1 && sets * blocks > 8)
  {
    StepScratch scratch;
#pragma omp for schedule(static)
    for (long b = 0; b < sets * blocks; ++b) {
      const long set = b / blocks, start = b % blocks * WIDTH;
      const int width = per_set - start < WIDTH ? int(per_set - start) : WIDTH;
      step_block(weights[set], in, hidden, cells, after, out_ld, set * per_set + start, width, scale, update, scratch);
    }
  }
}

// Back through the inputs of kind NORMALIZED: from derivatives with respect to them, x [2, n], and with respect to the new
// averages and step counts, d_m, d_v and d_step [n], to those with respect to the gradients, d_grads [n], and what was
// before the step, in place.
void lstm_normalized_back(const float* grads, const float* m, const float* v, const float* step, double decay,
                          float eps, long n, const float* x, float* d_m, float* d_v, float* d_step, float* d_grads,
                          int threads) {
  const float beta = float(decay), rest = float(1.0 - decay), rate = float(std::log(decay));
  constexpr int AT_ONCE = 256;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n > 8192)
  for (long start = 0; start < n; start += AT_ONCE) {
    const int width = n - start < AT_ONCE ? int(n - start) : AT_ONCE;
    float correction[AT_ONCE];
    for (int j = 0; j < width; ++j) {
      const bool again = j && step[start + j] == step[start + j - 1];
      correction[j] = again ? correction[j - 1] : -std::expm1(rate * (step[start + j] + 1.0f));
    }
    for (int j = 0; j < width; ++j) {
      const long i = start + j;
      const float g = grads[i], new_m = m[i] * beta + g * rest, new_v = v[i] * beta + g * g * rest;
      const bool idle = new_v == 0.0f;
      const float root = std::sqrt(idle ? 1.0f : new_v / correction[j]), scale = 1.0f / (root + eps);
      const float mean = new_m / correction[j];
      const float d_scale = x[i] * g + x[n + i] * mean;
      const float by_v = idle ? 0.0f : d_scale * scale * scale * 0.5f / (root * correction[j]);
      const float by_m = x[n + i] * scale / correction[j];
      const float into_v = d_v[i] - by_v, into_m = d_m[i] + by_m;
      const float by_correction = (by_v * new_v - by_m * new_m) / correction[j];
      d_step[i] -= by_correction * rate * (1.0f - correction[j]);
      d_grads[i] = x[i] * scale + into_m * rest + into_v * 2.0f * g * rest;
      d_m[i] = into_m * beta;
      d_v[i] = into_v * beta;
    }
  }
}

// Sums over the coordinates of every tensor, bounds [tensors + 1] telling where each begins, of
// a², b₁², b₂², b₃², a b₁, a b₂, a b₃, b₁ b₂, b₁ b₃ and b₂ b₃, where a is the gradient and b the averages of it before the
// step, all divided by the root of the average square after it, bounded as in `features.bounded_square`, and b₂ and b₃
// faded beside the root of the recent one; where the signal is told, b₃² once more, without the bias that an average has
// after so many steps, and how many a there are that are not zero. With CLIPS the next two are those of
// `features.clip_terms`, and with RESTS the last two those of `features.largest_terms`. What is not finite is left out.
// sums [10 to 16, tensors].
void lstm_context(const float* grads, const float* m, const float* v, long ld, const float* step, int shared_step,
                  double slow_beta, double beta, double recent_beta, float ratio, const long* bounds, long tensors,
                  double* sums, int threads) {
  const float keep = float(beta), rest = float(1.0 - beta);
  const float recent_keep = float(recent_beta), recent_rest = float(1.0 - recent_beta);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && bounds[tensors] > 4096)
  for (long s = 0; s < tensors; ++s) {
    double total[10] = {}, heard = 0.0, now_sum = 0.0, recent_sum = 0.0, largest_sum = 0.0, known = 0.0;
    for (long start = bounds[s]; start < bounds[s + 1]; start += 1024) {
      const long stop = bounds[s + 1] < start + 1024 ? bounds[s + 1] : start + 1024;
      float part[10][WIDTH] = {}, count[WIDTH] = {}, loud[WIDTH] = {}, calm[WIDTH] = {};
      float most_sum[WIDTH] = {}, most_count[WIDTH] = {};
      for (long i = start; i < stop; i += WIDTH) {
        const int width = stop - i < WIDTH ? int(stop - i) : WIDTH;
        alignas(64) float x[6 + RESTS][WIDTH];
        load_row(grads + i, width, x[0]);
        for (int k = 0; k < 3; ++k) load_row(m + k * ld + i, width, x[1 + k]);
        for (int k = 0; k < 2 + RESTS; ++k) load_row(v + k * ld + i, width, x[4 + k]);
        for (int j = 0; j < WIDTH; ++j) {
          const float now = x[0][j] * x[0][j], recent = x[5][j] * recent_keep + now * recent_rest;
          if (CLIPS) {
            const bool finite = (now < INFINITY) & (std::fabs(x[5][j]) < INFINITY);
            loud[j] += finite ? now : 0.0f;
            calm[j] += finite ? x[5][j] : 0.0f;
          }
          if (RESTS) {
            const float largest = x[5 + RESTS][j];
            const bool some = (largest > 0.0f) & (largest < INFINITY);
            most_sum[j] += some ? largest : 0.0f;
            most_count[j] += some ? 1.0f : 0.0f;
          }
          const float square = bounded(x[4][j] * keep + now * rest, recent, x[0][j], ratio);
          const float scale = square > 0.0f ? 1.0f / std::sqrt(square) : 0.0f, most = std::sqrt(recent) * scale;
          float a = x[0][j] * scale, b1 = x[1][j] * scale;
          float b2 = faded(x[2][j] * scale, most), b3 = faded(x[3][j] * scale, most);
          const bool sound = std::fabs(a) + std::fabs(b1) + std::fabs(b2) + std::fabs(b3) < 1e15f;
          a = sound ? a : 0.0f;
          b1 = sound ? b1 : 0.0f;
          b2 = sound ? b2 : 0.0f;
          b3 = sound ? b3 : 0.0f;
          if (TELLS_SIGNAL) count[j] += a != 0.0f ? 1.0f : 0.0f;
          part[0][j] += a * a;
          part[1][j] += b1 * b1;
          part[2][j] += b2 * b2;
          part[3][j] += b3 * b3;
          part[4][j] += a * b1;
          part[5][j] += a * b2;
          part[6][j] += a * b3;
          part[7][j] += b1 * b2;
          part[8][j] += b1 * b3;
          part[9][j] += b2 * b3;
        }
      }
      for (int k = 0; k < 10; ++k)
        for (int j = 0; j < WIDTH; ++j) total[k] += part[k][j];
      for (int j = 0; j < WIDTH && TELLS_SIGNAL; ++j) heard += count[j];
      for (int j = 0; j < WIDTH && CLIPS; ++j) {
        now_sum += loud[j];
        recent_sum += calm[j];
      }
      for (int j = 0; j < WIDTH && RESTS; ++j) {
        largest_sum += most_sum[j];
        known += most_count[j];
      }
    }
    for (int k = 0; k < 10; ++k) sums[k * tensors + s] = total[k];
    const double steps = step[shared_step ? 0 : bounds[s]], age = steps > 1.0 ? steps : 1.0;
    if (CLIPS) {
      sums[(10 + 2 * TELLS_SIGNAL) * tensors + s] = now_sum;
      sums[(11 + 2 * TELLS_SIGNAL) * tensors + s] = recent_sum / -std::expm1(age * std::log(recent_beta));
    }
    if (RESTS) {
      const int at = 10 + 2 * TELLS_SIGNAL + 2 * CLIPS;
      sums[at * tensors + s] = largest_sum;
      sums[(at + 1) * tensors + s] = known;
    }
    if (TELLS_SIGNAL) {
      const double correction = -std::expm1(age * std::log(slow_beta));
      sums[10 * tensors + s] = total[3] / (correction * correction);
      sums[11 * tensors + s] = heard;
    }
  }
}

// See `features.agreement`, `features.clip_factor` and `features.largest_root`: what those sums say, [4 to 8, tensors].
void lstm_agreement(const double* sums, long tensors, double loudness, double clip, double relative_eps, double* out) {
  for (long s = 0; s < tensors; ++s) {
    double q[10];
    for (int k = 0; k < 10; ++k) q[k] = sums[k * tensors + s];
    const double one = q[1], two = one + q[2] + 2.0 * q[7], three = two + q[3] + 2.0 * (q[8] + q[9]);
    const double products[4] = {q[4], q[4] + q[5], q[4] + q[5] + q[6], one + q[7] + q[8]};
    const double squares[4] = {q[0] * one, q[0] * two, q[0] * three, one * three};
    for (int k = 0; k < 4; ++k) {
      const double sharp = squares[k] > 0.0 ? 10.0 * (products[k] / std::sqrt(squares[k])) : 0.0;
      out[k * tensors + s] = sharp / (1.0 + std::fabs(sharp));
    }
    if (TELLS_SIGNAL) {
      const double sharp = q[0] > 0.0 ? 10.0 * std::sqrt(sums[10 * tensors + s] / q[0]) : 0.0;
      out[4 * tensors + s] = sharp / (1.0 + sharp);
    }
    if (HUSHED) {
      const double heard = sums[11 * tensors + s], loud = loudness * q[0] / (heard > 1.0 ? heard : 1.0);
      out[5 * tensors + s] = loud < 1.0 ? loud : 1.0;
    }
    if (CLIPS) {
      const int at = 10 + 2 * TELLS_SIGNAL;
      const double now = sums[at * tensors + s], most = clip * clip * sums[(at + 1) * tensors + s];
      out[CONTEXT * tensors + s] = (now > most) & (most > 0.0) ? std::sqrt(most / now) : 1.0;
    }
    if (RESTS) {
      const int at = 10 + 2 * TELLS_SIGNAL + 2 * CLIPS;
      const double known = sums[(at + 1) * tensors + s];
      out[(CONTEXT + CLIPS) * tensors + s] = relative_eps * std::sqrt(sums[at * tensors + s] / (known > 1.0 ? known : 1.0));
    }
  }
}

// Back through `steps` steps of n coordinates with one theta. Row t of grads and cotangents starts t * ld floats further
// on; state rows are state_ld apart. With `summed` the cotangent of an update is the sum of its row and all later
// ones. theta_grads [theta_size] is overwritten. Returns 0, or 1 without memory.
int lstm_backward(const float* theta, long n, int steps, int kind, const float* grads, long ld, const float* m,
                  const float* v, const float* step, int shared_step, const double* betas, float ratio, float eps,
                  float range, float growth, float most_grown, float leak, float brake,
                  float most_braked, const unsigned char* active, const float* hidden, const float* cells,
                  const float* log_size, long state_ld,
                  const float* cotangents, long cotangent_ld, int summed,
                  const float* hidden_in, const float* cells_in, const float* log_in, float* hidden_out,
                  float* cells_out, float* log_out, float* x_out, const float* context, long tensors, const int* tensor,
                  float scale, float* theta_grads, int threads) {
  const long blocks = (n + WIDTH - 1) / WIDTH, paying = blocks * steps / GROUP_STEPS;
  const long wanted = paying > 4 ? (paying + 2) / 4 * 4 : paying;  // for threads to get equal shares
  const long most = blocks < GROUPS ? blocks : GROUPS, groups = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const int slots = steps == 1 ? SLOTS : steps;
  Weights* weights = aligned<Weights>(1);
  float* parts = aligned<float>(size_t(groups) * AT.size);
  int failed = !weights || !parts;
  if (!failed) {
    fill(*weights, theta);
    const Inputs in{kind, grads, ld, m, v, state_ld, step, shared_step, betas, ratio, eps, range, active,
                    log_size, growth, most_grown, leak, brake, most_braked, context, tensors, tensor};
    const Outward outward{hidden_in, cells_in, hidden_out, cells_out, x_out, log_in, log_out};
#pragma omp parallel num_threads(threads) if (threads > 1 && groups > 1)
    {
      float* memory = aligned<float>(Tape::floats(slots));
      Sums* sums = aligned<Sums>(1);
      if (!memory || !sums) {
#pragma omp atomic write
        failed = 1;
      }
#pragma omp for schedule(dynamic, 1)
      for (long g = 0; g < groups; ++g) {
        if (!memory || !sums) continue;
        std::memset(sums, 0, sizeof(Sums));
        Tape tape(memory, slots);
        int slot = 0;
        for (long b = blocks * g / groups; b < blocks * (g + 1) / groups; ++b) {
          const long start = b * WIDTH;
          const int width = n - start < WIDTH ? int(n - start) : WIDTH;
          replay(*weights, in, hidden, cells, state_ld, start, width, slot, steps, scale, tape);
          back(*weights, cotangents, cotangent_ld, summed, outward, state_ld, start, width, slot, steps, range,
               tape, *sums, scale);
          slot += steps;
          if (slot + steps > slots) {
            accumulate(tape, slot, *sums);
            slot = 0;
          }
        }
        if (slot) accumulate(tape, slot, *sums);
        reduce(*sums, parts + g * AT.size);
      }
      release(memory);
      release(sums);
    }
    std::memset(theta_grads, 0, AT.size * sizeof(float));
    for (long g = 0; g < groups && !failed; ++g)
      for (int i = 0; i < AT.size; ++i) theta_grads[i] += parts[g * AT.size + i];
  }
  release(weights);
  release(parts);
  return failed;
}

}  // extern "C"
