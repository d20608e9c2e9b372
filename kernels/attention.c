/* Causal attention and its gradient, head by head; called by attention.py, compiled by native.py.
 *
 * A head's queries, keys and values are copied out of the tensor once, where they lie far apart,
 * and stay in the cache. Tiles of 48 queries meet the keys up to their last one: their scores never
 * leave the cache either, and are computed again for the gradient from what is kept of each row,
 * its largest score and the inverse of its sum. One head is the work of one thread, so the result
 * does not depend on how many there are.
 *
 * b sequences, n heads, s queries of which the first is at position `first`, h columns of queries
 * and keys, w of values. q [s, b, n, h], k [first + s, b, n, h] and v [first + s, b, n, w] may lie
 * anyhow but for their columns: strides [3, 3] are the steps between positions, sequences and heads
 * of each. All else is dense.
 */

#include "native.h"

#include <stdio.h>
#include <stdlib.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* A product keeps GROUP rows of two vectors in registers. */
enum { PANEL = 2 * LANES, GROUP = 6, TILE = 48, AHEAD = 12 };

/* A panel is PANEL columns of a matrix, its rows one after the other; the last is filled up with
 * zeros. */
INLINE int64_t in_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

/* c [rows, columns] = or += a [rows, depth] panel [depth, columns] for at most GROUP rows and PANEL
 * columns. */
INLINE void multiply_rows(int rows, const float *a, int64_t a_row, int64_t a_column,
                          const float *panel, int64_t depth, float *c, int64_t c_row,
                          int64_t columns, int adds) {
    lanes left[GROUP], right[GROUP];
    for (int i = 0; i < rows; i++) left[i] = right[i] = (lanes){0};
    for (int64_t k = 0; k < depth; k++) {
        lanes b0 = *(const lanes *)(panel + k * PANEL);
        lanes b1 = *(const lanes *)(panel + k * PANEL + LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            float x = a[i * a_row + k * a_column];
            left[i] += x * b0;
            right[i] += x * b1;
        }
    }
    for (int i = 0; i < rows; i++) {
        float *to = c + i * c_row;
        if (columns >= PANEL) {
            lanes *first = (lanes *)to, *second = (lanes *)(to + LANES);
            if (adds) left[i] += *first, right[i] += *second;
            *first = left[i], *second = right[i];
            continue;
        }
        float row[PANEL];
        *(lanes *)row = left[i];
        *(lanes *)(row + LANES) = right[i];
        for (int64_t j = 0; j < columns; j++) to[j] = adds ? to[j] + row[j] : row[j];
    }
}

/* Which numbers a product leaves out, because of a triangle of zeros where column - row > diagonal:
 * of c, of a, or, where row - column > diagonal, of a. */
enum triangle { OF_SCORES, OF_WEIGHTS, OF_TRANSPOSED_WEIGHTS };

/* c [rows, columns] = or += a [rows, depth] b [depth, columns]; b in panels of b_depth rows, a's
 * numbers a_row and a_column apart, so that it may be the transpose of what lies there. */
INLINE void multiply(const float *a, int64_t a_row, int64_t a_column, const float *b,
                     int64_t b_depth, float *c, int64_t c_row, int64_t rows, int64_t depth,
                     int64_t columns, enum triangle zeros, int64_t diagonal, int adds) {
    for (int64_t j = 0; j < columns; j += PANEL) {
        for (int64_t i = 0; i < rows; i += GROUP) {
            int64_t begin = 0, end = depth, seen = diagonal + i + GROUP;
            if (zeros == OF_SCORES && j >= seen) continue;
            if (zeros == OF_WEIGHTS && end > seen) end = seen;
            if (zeros == OF_TRANSPOSED_WEIGHTS && i > diagonal) begin = i - diagonal;
            const float *from = a + i * a_row + begin * a_column;
            const float *panel = b + j * b_depth + begin * PANEL;
            float *to = c + i * c_row + j;
            switch (rows - i) {
#define ROWS(count)                                                                                \
    multiply_rows(count, from, a_row, a_column, panel, end - begin, to, c_row, columns - j, adds)
            case 1: ROWS(1); break;
            case 2: ROWS(2); break;
            case 3: ROWS(3); break;
            case 4: ROWS(4); break;
            case 5: ROWS(5); break;
            default: ROWS(GROUP);
#undef ROWS
            }
        }
    }
}

/* c = x y^T for the `rows` queries of a tile, of which the first sees `diagonal` + 1 keys: x [rows,
 * d], y^T [d, keys] in panels; what they do not see stays as it is. */
static void score(const float *x, const float *yt, float *c, int64_t c_row, int64_t rows,
                  int64_t d, int64_t diagonal) {
    multiply(x, d, 1, yt, d, c, c_row, rows, d, diagonal + rows, OF_SCORES, diagonal, 0);
}

/* c [rows, d] = p x with p [rows, keys] and x [keys, d] in panels. */
static void sum_of_keys(const float *p, int64_t p_row, const float *x, int64_t keys, float *c,
                        int64_t rows, int64_t d, int64_t diagonal) {
    multiply(p, p_row, 1, x, keys, c, d, rows, diagonal + rows, d, OF_WEIGHTS, diagonal, 0);
}

/* c [keys, d] += p^T x with p [rows, keys] and x [rows, d] in panels. */
static void add_to_keys(const float *p, int64_t p_row, const float *x, float *c, int64_t rows,
                        int64_t d, int64_t diagonal) {
    multiply(p, 1, p_row, x, rows, c, d, diagonal + rows, rows, d, OF_TRANSPOSED_WEIGHTS, diagonal,
             1);
}

/* x [n, d] as panels of its columns. */
static void pack(const float *restrict x, float *restrict panels, int64_t n, int64_t d) {
    for (int64_t j = 0; j < d; j += PANEL) {
        int64_t wide = d - j < PANEL ? d - j : PANEL;
        float *to = panels + j * n;
        for (int64_t i = 0; i < n; i++, to += PANEL) {
            for (int64_t l = 0; l < wide; l++) to[l] = x[i * d + j + l];
            for (int64_t l = wide; l < PANEL; l++) to[l] = 0;
        }
    }
}

/* x [n, d] as panels of the columns of its transpose. */
static void pack_transposed(const float *restrict x, float *restrict panels, int64_t n, int64_t d) {
    for (int64_t j = 0; j < n; j += PANEL)
        for (int64_t l = 0; l < PANEL; l++) {
            const float *from = j + l < n ? x + (j + l) * d : 0;
            float *to = panels + j * d + l;
            for (int64_t i = 0; i < d; i++) to[i * PANEL] = from ? from[i] : 0;
        }
}

/* y [n, d] = x scale. Rows of x or y are x_row and y_row apart, a page or more: the processor does
 * not guess the next, so it is told. */
static void copy(const float *x, int64_t x_row, float *y, int64_t y_row, int64_t n, int64_t d,
                 float scale) {
    const float *far = x_row > d ? x : y;
    int64_t far_row = x_row > d ? x_row : y_row;
    for (int64_t i = 0; i < n; i++) {
        if (i + AHEAD < n)
            for (int64_t j = 0; j < d; j += 16)
                __builtin_prefetch(far + (i + AHEAD) * far_row + j);
        for (int64_t j = 0; j < d; j++) y[i * y_row + j] = x[i * x_row + j] * scale;
    }
}

static const float *head_of(const float *x, const int64_t *strides, int64_t head, int64_t n) {
    return x + head / n * strides[1] + head % n * strides[2];
}

static float *scratch(int64_t values) {
    float *found = malloc(sizeof(float) * (size_t)values);
    if (found) return found;
    fprintf(stderr, "attention: no memory for %lld values of scratch\n", (long long)values);
    abort();
}

/* Fills a row from column `seen` on, and returns the end of the last vector that it begins in: loops
 * up to there have no rest. */
INLINE int64_t end_of_row(float *x, int64_t seen, float value) {
    int64_t end = (seen + LANES - 1) / LANES * LANES;
    for (int64_t j = seen; j < end; j++) x[j] = value;
    return end;
}

/* Softmax in place of a row's scores, [keys], of which it sees the first `seen`, the others get 0;
 * kept [2]: the largest score and the inverse of the sum. */
static void softmax(float *restrict x, float *restrict kept, int64_t seen, int64_t keys) {
    float largest = -INFINITY, sum = 0.0f;
    int64_t end = end_of_row(x, seen, -INFINITY);
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < end; j++) largest = x[j] > largest ? x[j] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < end; j++) {
        x[j] = exp_of_negative(x[j] - largest);
        sum += x[j];
    }
    float share = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < end; j++) x[j] *= share;
    for (int64_t j = end; j < keys; j++) x[j] = 0.0f;
    kept[0] = largest;
    kept[1] = share;
}

/* In place, a row's scores become weights p again, as softmax made them, and their gradients d that
 * of the scores, p (d - sum of p d). */
static void softmax_backward(float *restrict p, float *restrict d, const float *restrict kept,
                             int64_t seen, int64_t keys) {
    float largest = kept[0], share = kept[1], sum = 0.0f;
    int64_t end = end_of_row(p, seen, -INFINITY);
    end_of_row(d, seen, 0.0f);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < end; j++) {
        p[j] = exp_of_negative(p[j] - largest) * share;
        sum += p[j] * d[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < end; j++) d[j] = p[j] * (d[j] - sum);
    for (int64_t j = end; j < keys; j++) p[j] = d[j] = 0.0f;
}

/* out = softmax(scale q k^T, causal) v, [s, b, n, w]; kept [b, n, s, 2]. */
void attention(const float *q, const float *k, const float *v, const int64_t *strides, float *out,
               float *kept, int64_t b, int64_t n, int64_t s, int64_t first, int64_t h, int64_t w,
               float scale, int64_t threads) {
    int64_t keys = first + s, row = in_panels(keys), widest = h > w ? h : w;
#pragma omp parallel num_threads(threads) if (b * n * s * keys >= WORTH_A_THREAD)
    {
        float *const all =
            scratch(row * h + keys * in_panels(w) + (keys + TILE) * widest + TILE * row);
        float *kt = all, *vs = kt + row * h, *plain = vs + keys * in_panels(w);
        float *part = plain + keys * widest, *scores = part + TILE * widest;
#pragma omp for
        for (int64_t head = 0; head < b * n; head++) {
            copy(head_of(k, strides + 3, head, n), strides[3], plain, h, keys, h, 1.0f);
            pack_transposed(plain, kt, keys, h);
            copy(head_of(v, strides + 6, head, n), strides[6], plain, w, keys, w, 1.0f);
            pack(plain, vs, keys, w);
            copy(head_of(q, strides, head, n), strides[0], plain, h, s, h, scale);
            for (int64_t at = 0; at < s; at += TILE) {
                int64_t rows = s - at < TILE ? s - at : TILE, end = first + at + rows;
                score(plain + at * h, kt, scores, row, rows, h, first + at);
                for (int64_t i = 0; i < rows; i++)
                    softmax(scores + i * row, kept + (head * s + at + i) * 2, first + at + i + 1,
                            end);
                sum_of_keys(scores, row, vs, keys, part, rows, w, first + at);
                copy(part, w, out + (at * b * n + head) * w, b * n * w, rows, w, 1.0f);
            }
        }
        free(all);
    }
}

/* The gradients by q, k and v, dense as they are, from that by out, [s, b, n, w]. */
void attention_backward(const float *q, const float *k, const float *v, const int64_t *strides,
                        const float *dout, const float *kept, float *dq, float *dk, float *dv,
                        int64_t b, int64_t n, int64_t s, int64_t first, int64_t h, int64_t w,
                        float scale, int64_t threads) {
    int64_t keys = first + s, row = in_panels(keys), hp = in_panels(h), wp = in_panels(w);
#pragma omp parallel num_threads(threads) if (b * n * s * keys >= WORTH_A_THREAD)
    {
        float *const all = scratch(row * (h + w) + keys * (hp + 2 * (h + w))
                                   + TILE * (2 * row + hp + wp + h));
        float *kt = all, *vt = kt + row * h, *ks = vt + row * w, *queries = ks + keys * hp;
        float *douts = queries + keys * h, *own_dk = douts + keys * w, *own_dv = own_dk + keys * h;
        float *p = own_dv + keys * w, *d = p + TILE * row, *qs = d + TILE * row;
        float *ds = qs + TILE * hp, *part = ds + TILE * wp;
#pragma omp for
        for (int64_t head = 0; head < b * n; head++) {
            copy(head_of(k, strides + 3, head, n), strides[3], queries, h, keys, h, 1.0f);
            pack_transposed(queries, kt, keys, h);
            pack(queries, ks, keys, h);
            copy(head_of(v, strides + 6, head, n), strides[6], douts, w, keys, w, 1.0f);
            pack_transposed(douts, vt, keys, w);
            copy(head_of(q, strides, head, n), strides[0], queries, h, s, h, scale);
            copy(dout + head * w, b * n * w, douts, w, s, w, 1.0f);
            memset(own_dk, 0, sizeof(float) * (size_t)(keys * (h + w)));
            for (int64_t at = 0; at < s; at += TILE) {
                int64_t rows = s - at < TILE ? s - at : TILE, end = first + at + rows;
                score(queries + at * h, kt, p, row, rows, h, first + at);
                score(douts + at * w, vt, d, row, rows, w, first + at);
                for (int64_t i = 0; i < rows; i++)
                    softmax_backward(p + i * row, d + i * row, kept + (head * s + at + i) * 2,
                                     first + at + i + 1, end);
                pack(queries + at * h, qs, rows, h);
                pack(douts + at * w, ds, rows, w);
                add_to_keys(p, row, ds, own_dv, rows, w, first + at);
                add_to_keys(d, row, qs, own_dk, rows, h, first + at);
                sum_of_keys(d, row, ks, keys, part, rows, h, first + at);
                copy(part, h, dq + (at * b * n + head) * h, b * n * h, rows, h, scale);
            }
            copy(own_dk, h, dk + head * h, b * n * h, keys, h, 1.0f);
            copy(own_dv, w, dv + head * w, b * n * w, keys, w, 1.0f);
        }
        free(all);
    }
}
