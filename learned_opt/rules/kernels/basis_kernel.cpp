// Matrices in a basis on the CPU, many small ones at once: see `basis.py`, which holds the definitions.
//
// Every matrix is worked on by one thread, and in the same way wherever it lies among others, so that the numbers
// depend neither on the number of threads nor on how many matrices there are. Matrices are row-major
// float32; what is computed of them is rounded once, at its end.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 8, TILE = 8;
#elif defined(__AVX__)
constexpr int LANES = 4, TILE = 4;
#else
constexpr int LANES = 2, TILE = 4;
#endif
typedef double Vec __attribute__((vector_size(LANES * sizeof(double)), aligned(8), may_alias));

inline Vec load(const double* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(double* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

// [rows, columns] with rows that are `padded` apart and end in zeros.
void copy(const float* from, long rows, long columns, double* to) {
  const long ld = padded(columns);
  for (long i = 0; i < rows; ++i) {
    std::copy(from + i * columns, from + (i + 1) * columns, to + i * ld);
    std::fill(to + i * ld + columns, to + (i + 1) * ld, 0.0);
  }
}

// The transpose, [columns, rows], likewise.
void transpose(const float* from, long rows, long columns, double* to) {
  const long ld = padded(rows);
  for (long j = 0; j < columns; ++j) {
    for (long i = 0; i < rows; ++i) to[j * ld + i] = from[i * columns + j];
    std::fill(to + j * ld + rows, to + (j + 1) * ld, 0.0);
  }
}

template <int R, int V, class A>
inline void tile(const A* a, long row, long column, const double* b, long inner, long ld, double* c) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (long k = 0; k < inner; ++k) {
    Vec right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + k * ld + v * LANES);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += double(a[r * row + k * column]) * right[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * ld + v * LANES, sum[r][v]);
}

template <int V, class A>
inline void tiles(const A* a, long row, long column, const double* b, long rows, long inner, long ld, double* c) {
  long i = 0;
  for (; i + TILE <= rows; i += TILE) tile<TILE, V>(a + i * row, row, column, b, inner, ld, c + i * ld);
  for (; i < rows; ++i) tile<1, V>(a + i * row, row, column, b, inner, ld, c + i * ld);
}

// c [rows, columns] = a·b, where a[i, k] lies at i·row + k·column, and b and c have padded rows.
template <class A>
void multiply(const A* a, long row, long column, const double* b, long rows, long inner, long columns, double* c) {
  const long ld = padded(columns);
  long j = 0;
  for (; j + 2 * LANES <= ld; j += 2 * LANES) tiles<2>(a, row, column, b + j, rows, inner, ld, c + j);
  if (j < ld) tiles<1>(a, row, column, b + j, rows, inner, ld, c + j);
}

// Room for four matrices of one thread, kept from call to call.
struct Scratch {
  double *first, *second, *third;
  float* narrow;
  Scratch(long rows, long columns) {
    static thread_local std::vector<double> numbers;
    const long longest = std::max(rows, columns);
    const size_t size = padded(longest) * longest;
    if (numbers.size() < 4 * size) numbers.resize(4 * size);
    first = numbers.data();
    second = first + size;
    third = second + size;
    narrow = reinterpret_cast<float*>(third + size);
  }
};

// x [rows, columns] turned by `left` (or its transpose) and by `right`; null for a side that is not turned.
template <bool BACK>
void turn(const float* x, long rows, long columns, const float* left, const float* right, float* out, Scratch& s) {
  const long ld = padded(columns);
  copy(x, rows, columns, s.first);
  double *done = s.first, *room = s.second;
  if (left) {
    multiply(left, BACK ? rows : 1, BACK ? 1 : rows, done, rows, rows, columns, room);
    std::swap(done, room);
  }
  if (right) {
    (BACK ? transpose : copy)(right, columns, columns, s.third);
    multiply(done, ld, 1, s.third, rows, columns, columns, room);
    std::swap(done, room);
  }
  for (long i = 0; i < rows; ++i) std::copy(done + i * ld, done + i * ld + columns, out + i * columns);
}

// See `without_noise`: a largest number that is none leaves all as it is.
void clean(float* x, long n) {
  constexpr int PARTS = 16;  // which the compiler works on side by side
  float highest[PARTS] = {}, unknown[PARTS] = {};
  long i = 0;
  for (; i + PARTS <= n; i += PARTS)
    for (int k = 0; k < PARTS; ++k) {
      const float size = std::fabs(x[i + k]);
      highest[k] = size > highest[k] ? size : highest[k];
      unknown[k] += size - size;
    }
  for (; i < n; ++i) {
    highest[0] = std::max(highest[0], std::fabs(x[i]));
    unknown[0] += x[i] - x[i];
  }
  float largest = 0.0f;
  for (int k = 0; k < PARTS; ++k) {
    if (unknown[k] != 0.0f) return;
    largest = std::max(largest, highest[k]);
  }
  const float least = 8.0f * FLT_EPSILON * largest;
  for (i = 0; i < n; ++i) x[i] = std::fabs(x[i]) < least ? 0.0f : x[i];
}

void mix(const float* before, const double* product, long n, double decay, float* after) {
  const long ld = padded(n);
  for (long i = 0; i < n; ++i)
    for (long j = 0; j < n; ++j)
      after[i * n + j] = float(decay * before[i * n + j] + (1.0 - decay) * product[i * ld + j]);
}

inline double dot(const double* a, const double* b, long n) {  // n is a multiple of LANES
  Vec sum{};
  for (long i = 0; i < n; i += LANES) sum += load(a + i) * load(b + i);
  double out = 0.0;
  for (int i = 0; i < LANES; ++i) out += sum[i];
  return out;
}

// The first factor of the QR decomposition of the matrix of these columns [n, ld], with a positive diagonal in the
// second: the columns are made orthogonal in order.
void orthogonal(double* columns, long n, long ld, float* out) {
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
    float* sound = s.narrow;
    for (long i = 0; i < rows * columns; ++i) sound[i] = std::fabs(grad[i]) < large ? grad[i] : 0.0f;
    if (left) {
      transpose(sound, rows, columns, s.first);
      multiply(sound, columns, 1, s.first, rows, columns, rows, s.second);
      mix(left + index * rows * rows, s.second, rows, decay, left_after + index * rows * rows);
    }
    if (right) {
      copy(sound, rows, columns, s.first);
      multiply(sound, 1, columns, s.first, columns, rows, columns, s.second);
      const long at = index * columns * columns;
      mix(right + at, s.second, columns, decay, right_after + at);
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
                  double shift, float* out, int threads) {
  return for_all(number, n, n, threads, [=](long index, Scratch& s) {
    const float* average = averages + index * n * n;
    const float* before = vectors + index * n * n;
    const long ld = padded(n);
    double trace = 0.0;
    for (long i = 0; i < n; ++i) trace += average[i * n + i];
    trace = trace < DBL_MIN ? DBL_MIN : trace;  // what is not a number stays
    double* columns = s.first;  // of (average / trace + shift) · vectors
    for (long j = 0; j < n; ++j) {
      double* column = columns + j * ld;
      std::fill(column, column + ld, 0.0);
      for (long k = 0; k < n; ++k) {
        const double share = first[index] ? double(j == k) : double(before[k * n + j]);
        if (share == 0.0) continue;
        const float* row = average + k * n;  // the average is symmetric
        for (long i = 0; i < n; ++i) column[i] += share * row[i];
      }
      for (long i = 0; i < n; ++i)
        column[i] = column[i] / trace + shift * (first[index] ? double(i == j) : double(before[i * n + j]));
    }
    orthogonal(columns, n, ld, out + index * n * n);
  });
}
}
