// Matrices in a basis on the CPU, many small ones at once: see `basis.py`, which holds the definitions.
//
// Every matrix is worked on by one thread, and in the same way wherever it lies among others, so that the numbers
// depend neither on the number of threads nor on how many matrices there are. Matrices are row-major float32.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef double Wide __attribute__((vector_size(LANES * sizeof(float)), aligned(8), may_alias));
constexpr int WIDE = LANES / 2;

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

// [rows, columns] with rows that are `padded` apart and end in zeros.
void copy(const float* from, long rows, long columns, float* to) {
  const long ld = padded(columns);
  for (long i = 0; i < rows; ++i) {
    std::memcpy(to + i * ld, from + i * columns, columns * sizeof(float));
    std::fill(to + i * ld + columns, to + (i + 1) * ld, 0.0f);
  }
}

// The transpose, [columns, rows], likewise.
void transpose(const float* from, long rows, long columns, float* to) {
  const long ld = padded(rows);
  for (long j = 0; j < columns; ++j) {
    for (long i = 0; i < rows; ++i) to[j * ld + i] = from[i * columns + j];
    std::fill(to + j * ld + rows, to + (j + 1) * ld, 0.0f);
  }
}

template <int R, int V>
inline void tile(const float* a, long row, long column, const float* b, long inner, long ld, float* c) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (long k = 0; k < inner; ++k) {
    Vec right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + k * ld + v * LANES);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * row + k * column] * right[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * ld + v * LANES, sum[r][v]);
}

template <int V>
inline void tiles(const float* a, long row, long column, const float* b, long rows, long inner, long ld, float* c) {
  long i = 0;
  constexpr int R = LANES == 16 ? 8 : 4;
  for (; i + R <= rows; i += R) tile<R, V>(a + i * row, row, column, b, inner, ld, c + i * ld);
  if (R == 8)
    for (; i + 4 <= rows; i += 4) tile<4, V>(a + i * row, row, column, b, inner, ld, c + i * ld);
  for (; i < rows; ++i) tile<1, V>(a + i * row, row, column, b, inner, ld, c + i * ld);
}

// c [rows, columns] = a·b, where a[i, k] lies at i·row + k·column, and b and c have padded rows.
void multiply(const float* a, long row, long column, const float* b, long rows, long inner, long columns, float* c) {
  const long ld = padded(columns);
  long j = 0;
  for (; j + 2 * LANES <= ld; j += 2 * LANES) tiles<2>(a, row, column, b + j, rows, inner, ld, c + j);
  if (j < ld) tiles<1>(a, row, column, b + j, rows, inner, ld, c + j);
}

// Room for four matrices of one thread, kept from call to call.
struct Scratch {
  float *first, *second, *third, *fourth;
  double* wide;
  Scratch(long rows, long columns) {
    static thread_local std::vector<double> numbers;
    const long longest = std::max(rows, columns);
    const size_t size = padded(longest) * longest;
    if (numbers.size() < 3 * size) numbers.resize(3 * size);
    wide = numbers.data();
    first = reinterpret_cast<float*>(wide + size);
    second = first + size;
    third = second + size;
    fourth = third + size;
  }
};

// x [rows, columns] turned by `left` (or its transpose) and by `right`; null for a side that is not turned.
template <bool BACK>
void turn(const float* x, long rows, long columns, const float* left, const float* right, float* out, Scratch& s) {
  const long ld = padded(columns);
  const float* half = x;
  long half_ld = columns;
  if (left) {
    copy(x, rows, columns, s.first);
    multiply(left, BACK ? rows : 1, BACK ? 1 : rows, s.first, rows, rows, columns, s.second);
    half = s.second;
    half_ld = ld;
  }
  const float* done = half;
  long done_ld = half_ld;
  if (right) {
    (BACK ? transpose : copy)(right, columns, columns, s.first);
    multiply(half, half_ld, 1, s.first, rows, columns, columns, s.third);
    done = s.third;
    done_ld = ld;
  }
  for (long i = 0; i < rows; ++i) std::memcpy(out + i * columns, done + i * done_ld, columns * sizeof(float));
}

// See `without_noise`: a largest number that is none leaves all as it is.
void clean(float* x, long n) {
  Vec highest{}, lowest{}, sum{};
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec value = load(x + i);
    highest = value > highest ? value : highest;
    lowest = value < lowest ? value : lowest;
    sum += value - value;
  }
  float largest = 0.0f, unknown = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) {
    largest = std::max({largest, highest[lane], -lowest[lane]});
    unknown += sum[lane];
  }
  for (; i < n; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    unknown += x[i] - x[i];
  }
  if (unknown != 0.0f) return;
  const float least = 8.0f * FLT_EPSILON * largest;
  for (i = 0; i < n; ++i) x[i] = std::fabs(x[i]) < least ? 0.0f : x[i];
}

void mix(const float* before, const float* product, long n, float decay, float rest, float* after) {
  const long ld = padded(n);
  for (long i = 0; i < n; ++i)
    for (long j = 0; j < n; ++j) after[i * n + j] = decay * before[i * n + j] + rest * product[i * ld + j];
}

inline double dot(const double* a, const double* b, long n) {  // n is a multiple of WIDE
  Wide sum{};
  for (long i = 0; i < n; i += WIDE)
    sum += *reinterpret_cast<const Wide*>(a + i) * *reinterpret_cast<const Wide*>(b + i);
  double out = 0.0;
  for (int i = 0; i < WIDE; ++i) out += sum[i];
  return out;
}

// The first factor of the QR decomposition of power [n, n] (padded rows), with a positive diagonal in the second:
// columns are made orthogonal in order, in double precision, which the float32 of the result is far from.
void orthogonal(const float* power, long n, float* out, Scratch& s) {
  const long ld = padded(n);
  double* columns = s.wide;
  for (long j = 0; j < n; ++j)
    for (long i = 0; i < ld; ++i) columns[j * ld + i] = i < n ? power[i * ld + j] : 0.0;
  for (long j = 0; j < n; ++j) {
    double* one = columns + j * ld;
    const double norm = std::sqrt(dot(one, one, ld));
    for (long i = 0; i < n; ++i) one[i] /= norm;
    for (long k = j + 1; k < n; ++k) {
      double* other = columns + k * ld;
      const double share = dot(one, other, ld);
      for (long i = 0; i < ld; ++i) other[i] -= share * one[i];
    }
  }
  for (long i = 0; i < n; ++i)
    for (long j = 0; j < n; ++j) out[i * n + j] = float(columns[j * ld + i]);
}

// Calls `each(index, scratch)` for all matrices; returns whether memory was short.
template <class Each>
int for_all(long number, long rows, long columns, int threads, Each each) {
  int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && number > 1) reduction(| : failed)
  for (long index = 0; index < number; ++index) {
    try {
      Scratch scratch(rows, columns);
      each(index, scratch);
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
  }
  return failed;
}

}  // namespace

extern "C" {

// averages after = decay · before + (1 − decay) · (G·Gᵀ or Gᵀ·G); null for a side that is not turned. Numbers of at
// least `large`, or that are none, count zero.
int basis_observe(const float* grads, long spacing, long number, long rows, long columns, double decay, float large,
                  const float* left, float* left_after, const float* right, float* right_after, int threads) {
  return for_all(number, rows, columns, threads, [=](long index, Scratch& s) {
    const float* grad = grads + index * spacing;
    float* sound = s.fourth;
    for (long i = 0; i < rows * columns; ++i) sound[i] = std::fabs(grad[i]) < large ? grad[i] : 0.0f;
    if (left) {
      transpose(sound, rows, columns, s.first);
      multiply(sound, columns, 1, s.first, rows, columns, rows, s.second);
      mix(left + index * rows * rows, s.second, rows, float(decay), float(1.0 - decay), left_after + index * rows * rows);
    }
    if (right) {
      copy(sound, rows, columns, s.first);
      multiply(sound, 1, columns, s.first, columns, rows, columns, s.second);
      const long at = index * columns * columns;
      mix(right + at, s.second, columns, float(decay), float(1.0 - decay), right_after + at);
    }
  });
}

// x [number, rows, columns], `spacing` apart, into the bases (or back from them), matrix k by the vectors of set
// k % sets; then, if asked to, without what is rounding.
int basis_turn(const float* x, long spacing, long number, long rows, long columns, long sets, const float* left,
               const float* right, int back, int cleaned, float* out, int threads) {
  return for_all(number, rows, columns, threads, [=](long index, Scratch& s) {
    const long set = index % sets;
    const float* l = left ? left + set * rows * rows : nullptr;
    const float* r = right ? right + set * columns * columns : nullptr;
    float* to = out + index * rows * columns;
    (back ? turn<true> : turn<false>)(x + index * spacing, rows, columns, l, r, to, s);
    if (cleaned) clean(to, rows * columns);
  });
}

// One step of orthogonal iteration for averages and vectors [number, n, n]; where `first` says so (one byte a matrix),
// from the identity.
int basis_refresh(const float* averages, const float* vectors, long number, long n, const unsigned char* first,
                  float shift, float* out, int threads) {
  return for_all(number, n, n, threads, [=](long index, Scratch& s) {
    const float* average = averages + index * n * n;
    const float* before = vectors + index * n * n;
    const long ld = padded(n);
    float trace = 0.0f;
    for (long i = 0; i < n; ++i) trace += average[i * n + i];
    trace = trace < FLT_MIN ? FLT_MIN : trace;  // what is not a number stays
    if (first[index]) {
      copy(average, n, n, s.second);
      for (long i = 0; i < n; ++i)
        for (long j = 0; j < n; ++j) s.second[i * ld + j] = s.second[i * ld + j] / trace + (i == j ? shift : 0.0f);
    } else {
      copy(before, n, n, s.first);
      multiply(average, n, 1, s.first, n, n, n, s.second);
      for (long i = 0; i < n; ++i)
        for (long j = 0; j < n; ++j) s.second[i * ld + j] = s.second[i * ld + j] / trace + shift * before[i * n + j];
    }
    orthogonal(s.second, n, out + index * n * n, s);
  });
}
}
