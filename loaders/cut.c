/* A crop of an RGB image resized: bilinear, antialiased where it shrinks, as PIL and torch with antialias=True do.

   out[y][x] = sum_i sum_j v[y][i] h[x][j] crop[i][j], v and h normalised triangles of half-width max(1, in / out) around
   (y + 1/2) in / out. 8 fraction bits between the axes, 16 in the weights, one rounding at the end.

   Rows first, SIMD along them; then ROWS rows at a time stand as columns, so that SIMD runs along those as well, without
   a gather. All of it stays in the L2 cache. No Python.h: cut.py calls it through ctypes. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 16

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t words8 __attribute__((vector_size(16)));
typedef uint32_t words4 __attribute__((vector_size(16)));
typedef uint64_t words2 __attribute__((vector_size(16)));

#if defined(__clang__)
#define LOW16(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH16(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW8(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH8(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW32(a, b) (words8) __builtin_shufflevector((words4)(a), (words4)(b), 0, 4, 1, 5)
#define HIGH32(a, b) (words8) __builtin_shufflevector((words4)(a), (words4)(b), 2, 6, 3, 7)
#define LOW64(a, b) (words8) __builtin_shufflevector((words2)(a), (words2)(b), 0, 2)
#define HIGH64(a, b) (words8) __builtin_shufflevector((words2)(a), (words2)(b), 1, 3)
#else
#define LOW16(a, b) __builtin_shuffle(a, b, (words8){0, 8, 1, 9, 2, 10, 3, 11})
#define HIGH16(a, b) __builtin_shuffle(a, b, (words8){4, 12, 5, 13, 6, 14, 7, 15})
#define LOW8(a, b) __builtin_shuffle(a, b, (bytes16){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define HIGH8(a, b) __builtin_shuffle(a, b, (bytes16){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#define LOW32(a, b) (words8) __builtin_shuffle((words4)(a), (words4)(b), (words4){0, 4, 1, 5})
#define HIGH32(a, b) (words8) __builtin_shuffle((words4)(a), (words4)(b), (words4){2, 6, 3, 7})
#define LOW64(a, b) (words8) __builtin_shuffle((words2)(a), (words2)(b), (words2){0, 2})
#define HIGH64(a, b) (words8) __builtin_shuffle((words2)(a), (words2)(b), (words2){1, 3})
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__SSE2__)
#include <emmintrin.h>
INLINE words8 high_product(words8 a, words8 b) { return (words8)_mm_mulhi_epu16((__m128i)a, (__m128i)b); }
INLINE bytes16 narrow(words8 a, words8 b) { return (bytes16)_mm_packus_epi16((__m128i)a, (__m128i)b); }
#else
INLINE words8 high_product(words8 a, words8 b) {
    for (int i = 0; i < 8; i++) a[i] = (uint16_t)((uint32_t)a[i] * b[i] >> 16);
    return a;
}
INLINE bytes16 narrow(words8 a, words8 b) {
    bytes16 both;
    for (int i = 0; i < 8; i++) both[i] = (uint8_t)a[i], both[i + 8] = (uint8_t)b[i];
    return both;
}
#endif

#if defined(__x86_64__) && defined(__gnu_linux__)
#define EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define EACH_CPU
#endif

/* One axis: output k is the sum of taps[k] inputs from first[k] on, with the weights from k * most on, 1 being 65535. */
typedef struct {
    int most;
    int *first, *taps;
    uint16_t *weight;
} Axis;

static int most_taps(int in, int out) {
    double scale = (double)in / out, support = scale > 1 ? scale : 1;
    return 2 * (int)(support + 1) + 1;
}

static void lay_axis(Axis *axis, int in, int out, double *room) {
    double scale = (double)in / out, support = scale > 1 ? scale : 1, steepness = 1 / support;
    for (int k = 0; k < out; k++) {
        double centre = scale * (k + 0.5), begin = centre - support + 0.5, sum = 0;
        int low = begin > 0 ? (int)begin : 0, high = (int)(centre + support + 0.5);
        if (high > in) high = in;
        for (int i = low; i < high; i++) {
            double far = i - centre + 0.5, w = 1 - (far < 0 ? -far : far) * steepness;
            sum += room[i - low] = w > 0 ? w : 0;
        }
        int largest = 0, left = 65535;
        uint16_t *weight = axis->weight + (size_t)k * axis->most;
        double norm = 65535 / sum;
        for (int i = 0; i < high - low; i++) {
            weight[i] = (uint16_t)(room[i] * norm + 0.5);
            left -= weight[i];
            if (weight[i] > weight[largest]) largest = i;
        }
        weight[largest] = (uint16_t)(weight[largest] + left); /* they sum to 65535, so that white stays white */
        axis->first[k] = low;
        axis->taps[k] = high - low;
    }
}

INLINE uint16_t part(uint32_t value, uint32_t weight) { return (uint16_t)(value * weight >> 16); }

/* to[0..n) = the weighted sum of `taps` rows of bytes, in 1/256; each product is cut off, half a unit on average. */
INLINE void blend(const uint8_t *restrict from, ptrdiff_t pitch, const uint16_t *weight, int taps,
                  uint16_t *restrict to, int n) {
    if (taps == 1) {
        for (int j = 0; j < n; j++) to[j] = (uint16_t)(from[j] << 8);
        return;
    }
    const uint8_t *next = from + pitch;
    for (int j = 0; j < n; j++) {
        to[j] = (uint16_t)(part((uint16_t)(from[j] << 8), weight[0]) + part((uint16_t)(next[j] << 8), weight[1]) + 1);
    }
    for (int k = 2; k < taps; k += 2) {
        const uint8_t *a = from + k * pitch, *b = k + 1 < taps ? a + pitch : a;
        uint16_t v = weight[k], w = k + 1 < taps ? weight[k + 1] : 0;
        for (int j = 0; j < n; j++) {
            to[j] = (uint16_t)(to[j] + part((uint16_t)(a[j] << 8), v) + part((uint16_t)(b[j] << 8), w) + 1);
        }
    }
}

/* from: ROWS rows of `pitch` words, pitch a multiple of 8. to: pitch columns of ROWS words. */
INLINE void stand(const uint16_t *from, int pitch, uint16_t *to) {
    for (int j = 0; j < pitch; j += 8) {
        for (int half = 0; half < ROWS; half += 8) {
            words8 a[8], b[8];
            for (int r = 0; r < 8; r++) memcpy(&a[r], from + (size_t)(half + r) * pitch + j, 16);
            for (int r = 0; r < 4; r++) {
                b[2 * r] = LOW16(a[2 * r], a[2 * r + 1]);
                b[2 * r + 1] = HIGH16(a[2 * r], a[2 * r + 1]);
            }
            for (int r = 0; r < 8; r += 4) {
                a[r] = LOW32(b[r], b[r + 2]);
                a[r + 1] = HIGH32(b[r], b[r + 2]);
                a[r + 2] = LOW32(b[r + 1], b[r + 3]);
                a[r + 3] = HIGH32(b[r + 1], b[r + 3]);
            }
            for (int r = 0; r < 4; r++) {
                b[2 * r] = LOW64(a[r], a[r + 4]);
                b[2 * r + 1] = HIGH64(a[r], a[r + 4]);
            }
            for (int r = 0; r < 8; r++) memcpy(to + (size_t)(j + r) * ROWS + half, &b[r], 16);
        }
    }
}

/* from: `columns` columns of ROWS bytes, a multiple of 16 of them. to: the first `rows` rows, each `width` bytes. */
INLINE void lie(const uint8_t *from, int columns, uint8_t *to, int rows, int width) {
    for (int j = 0; j < columns; j += 16) {
        bytes16 a[16], b[16];
        for (int r = 0; r < 16; r++) memcpy(&a[r], from + (size_t)(j + r) * ROWS, 16);
        for (int stage = 0; stage < 2; stage++) { /* four perfect shuffles of 256 bytes turn a 16 x 16 square */
            for (int r = 0; r < 8; r++) {
                b[2 * r] = LOW8(a[r], a[r + 8]);
                b[2 * r + 1] = HIGH8(a[r], a[r + 8]);
            }
            for (int r = 0; r < 8; r++) {
                a[2 * r] = LOW8(b[r], b[r + 8]);
                a[2 * r + 1] = HIGH8(b[r], b[r + 8]);
            }
        }
        int n = width - j < 16 ? width - j : 16;
        for (int r = 0; r < rows; r++) {
            if (n == 16) memcpy(to + (size_t)r * width + j, &a[r], 16);
            else memcpy(to + (size_t)r * width + j, &a[r], (size_t)n);
        }
    }
}

/* from: columns of ROWS words in 1/256. to: out * 3 columns of ROWS bytes. */
INLINE void across(const uint16_t *restrict from, const Axis *axis, int out, uint8_t *restrict to) {
    for (int x = 0; x < out; x++) {
        const uint16_t *weight = axis->weight + (size_t)x * axis->most, *at = from + (size_t)axis->first[x] * 3 * ROWS;
        int taps = axis->taps[x];
        words8 sum[6], half = (words8){0} + (uint16_t)(128 + taps / 2);
        for (int v = 0; v < 6; v++) sum[v] = half;
        for (int k = 0; k < taps; k++, at += 3 * ROWS) {
            words8 w = (words8){0} + weight[k], value;
            for (int v = 0; v < 6; v++) {
                memcpy(&value, at + 8 * v, 16);
                sum[v] += high_product(value, w);
            }
        }
        for (int v = 0; v < 6; v += 2) {
            bytes16 both = narrow(sum[v] >> 8, sum[v + 1] >> 8);
            memcpy(to + (size_t)x * 3 * ROWS + 8 * v, &both, 16);
        }
    }
}

/* Past the caches where it can: a batch is larger than they are, and its lines need not be read to be overwritten. */
INLINE void put(const uint8_t *from, uint8_t *to, size_t n) {
    size_t done = 0;
#if defined(__SSE2__)
    if (((uintptr_t)to & 15) == 0) {
        for (; done + 16 <= n; done += 16) {
            _mm_stream_si128((__m128i *)(to + done), _mm_loadu_si128((const __m128i *)(from + done)));
        }
    }
#endif
    memcpy(to + done, from + done, n - done);
}

EACH_CPU static void cut_blocks(const uint8_t *crop, ptrdiff_t pitch, const Axis *down, const Axis *right, int width,
                                int size, uint16_t *rows, uint16_t *columns, uint8_t *turned, uint8_t *out) {
    int n = 3 * width, padded = (n + 7) & ~7, last = (3 * size + 15) & ~15;
    uint8_t *lying = turned + (size_t)last * ROWS;
    for (int top = 0; top < size; top += ROWS) {
        int count = size - top < ROWS ? size - top : ROWS;
        for (int r = 0; r < count; r++) {
            int y = top + r;
            blend(crop + down->first[y] * pitch, pitch, down->weight + (size_t)y * down->most, down->taps[y],
                  rows + (size_t)r * padded, n);
        }
        stand(rows, padded, columns);
        across(columns, right, size, turned);
        lie(turned, last, lying, count, 3 * size);
        put(lying, out + (size_t)top * 3 * size, (size_t)count * 3 * size);
    }
}

/* crop: the first byte of height x width pixels, whose rows are pitch bytes apart. out: size x size pixels, contiguous.
   height and width up to 32 size, so that no sum passes 65535. 0, or 1 where there is no memory. */
int fastsimclr_cut(const uint8_t *crop, int64_t pitch, int height, int width, int size, uint8_t *out) {
    int padded = (3 * width + 7) & ~7, last = (3 * size + 15) & ~15;
    Axis down = {.most = most_taps(height, size)}, right = {.most = most_taps(width, size)};
    int most = down.most > right.most ? down.most : right.most;
    size_t words = (size_t)padded * ROWS, weights = (size_t)size * (down.most + right.most);
    double *room = malloc(8 * (size_t)most + 16 * (size_t)size + 4 * words + 2 * weights + 2 * (size_t)last * ROWS);
    if (!room) return 1;
    int *ints = (int *)(room + most);
    uint16_t *rows = (uint16_t *)(ints + 4 * (size_t)size), *columns = rows + words;
    down.first = ints, down.taps = ints + size, right.first = ints + 2 * size, right.taps = ints + 3 * size;
    down.weight = columns + words, right.weight = down.weight + (size_t)size * down.most;
    lay_axis(&down, height, size, room);
    lay_axis(&right, width, size, room);
    cut_blocks(crop, pitch, &down, &right, width, size, rows, columns, (uint8_t *)(right.weight + (size_t)size * right.most),
               out);
    free(room);
#if defined(__SSE2__)
    _mm_sfence(); /* other threads see what was streamed once they are told that it is there */
#endif
    return 0;
}

/* The crops of n images and `views` views: view v of image k from memory + starts[k], of widths[k] pixels a row, its
   window boxes[v * stride + k] = (top, left, height, width), into out[v * stride + k]. */
int fastsimclr_cut_many(const uint8_t *memory, int n, int views, int64_t stride, const int64_t *starts,
                        const int32_t *widths, const int32_t (*boxes)[4], int size, uint8_t *out) {
    size_t bytes = 3 * (size_t)size * size;
    for (int k = 0; k < n; k++) {
        int64_t pitch = 3 * (int64_t)widths[k];
        for (int v = 0; v < views; v++) {
            const int32_t *box = boxes[v * stride + k];
            const uint8_t *crop = memory + starts[k] + box[0] * pitch + 3 * (int64_t)box[1];
            if (fastsimclr_cut(crop, pitch, box[2], box[3], size, out + (v * stride + k) * bytes)) return 1;
        }
    }
    return 0;
}

/* counts[k] bytes of n images, from memory + starts[k] to out + out_starts[k]. */
void fastsimclr_copy_many(const uint8_t *memory, int n, const int64_t *starts, const int64_t *counts, uint8_t *out,
                          const int64_t *out_starts) {
    for (int k = 0; k < n; k++) memcpy(out + out_starts[k], memory + starts[k], (size_t)counts[k]);
}

/* To be raised with any change to what these functions and jpeg.c's take (compiled.py). */
int fastsimclr_cut_version(void) { return 3; }
