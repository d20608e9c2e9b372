/* What operators called one by one cannot do on a CPU: pass over values once, while they are in the
 * cache. Loaded by native.py, each used beside torch's own operators, which are its reference.
 *
 * All of it is fp32. Sums over tokens are made of blocks of a fixed size, added in one order, so
 * that the result does not depend on the number of threads. NaN and infinity go through as in torch.
 *
 * n rows (tokens), d columns (model), f columns (FFN width); arrays are dense and row by row.
 */

#include "native.h"

/* a = silu(gate) up weight; hidden [n, 2f] is gate and up side by side, weight may be NULL. */
void swiglu(const float *restrict hidden, const float *restrict weight, float *restrict a,
            int64_t n, int64_t f, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * f >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        const float *gate = hidden + row * 2 * f, *up = gate + f;
        float *out = a + row * f, w = weight ? weight[row] : 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < f; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i] * w;
    }
}

/* The gradients of swiglu by hidden, [n, 2f], and by weight, [n] (NULL: not wanted), from that by
 * a; a itself, [n, f], which the gradient of the next matrix needs, is computed again (may stand
 * where da stood). silu' = s + silu (1 - s) with s = sigmoid(gate). */
void swiglu_backward(const float *restrict hidden, const float *restrict weight, const float *da,
                     float *a, float *restrict dhidden, float *restrict dweight, int64_t n,
                     int64_t f, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * f >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        const float *gate = hidden + row * 2 * f, *up = gate + f, *given = da + row * f;
        float *dgate = dhidden + row * 2 * f, *dup = dgate + f, *out = a + row * f;
        float w = weight ? weight[row] : 1.0f, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < f; i++) {
            float s = sigmoid(gate[i]), silu = gate[i] * s, d = given[i];
            sum += d * silu * up[i];
            dup[i] = d * silu * w;
            dgate[i] = d * up[i] * w * (s + silu * (1.0f - s));
            out[i] = silu * up[i] * w;
        }
        if (dweight) dweight[row] = sum;
    }
}

/* y = x inverse scale with inverse = 1 / sqrt(mean(x^2) + eps); x and y [n, d], inverse [n]. */
void rms_norm(const float *restrict x, const float *restrict scale, float *restrict y,
              float *restrict inverse, int64_t n, int64_t d, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * d >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        const float *in = x + row * d;
        float *out = y + row * d, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += in[i] * in[i];
        float r = inverse[row] = 1.0f / sqrtf(sum / (float)d + eps);
#pragma omp simd
        for (int64_t i = 0; i < d; i++) out[i] = in[i] * r * scale[i];
    }
}

enum { BLOCK_ROWS = 64 };

/* dx = r scale dy - x r^3 (dy x . scale) / d, [n, d], and of each block of 64 rows its part of
 * dscale = sum of dy x r, [ceil(n / 64), d]. */
void rms_norm_backward(const float *restrict dy, const float *restrict x,
                       const float *restrict scale, const float *restrict inverse,
                       float *restrict dx, float *restrict dscale_parts, int64_t n, int64_t d, int64_t threads) {
    int64_t num_blocks = (n + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for num_threads(threads) if (n * d >= WORTH_A_THREAD)
    for (int64_t block = 0; block < num_blocks; block++) {
        float *part = dscale_parts + block * d;
        int64_t end = (block + 1) * BLOCK_ROWS < n ? (block + 1) * BLOCK_ROWS : n;
        memset(part, 0, sizeof(float) * (size_t)d);
        for (int64_t row = block * BLOCK_ROWS; row < end; row++) {
            const float *in = x + row * d, *given = dy + row * d;
            float *out = dx + row * d, r = inverse[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < d; i++) {
                float product = given[i] * in[i];
                part[i] += product * r;
                sum += product * scale[i];
            }
            float along = -sum * r * r * r / (float)d;
#pragma omp simd
            for (int64_t i = 0; i < d; i++) out[i] = given[i] * scale[i] * r + in[i] * along;
        }
    }
}

/* y[r] = x[index[r]], zeros where index is below 0; y [n, d]. */
void take_rows(const float *restrict x, const int64_t *restrict index, float *restrict y,
               int64_t n, int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * d >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        if (index[row] < 0)
            memset(y + row * d, 0, sizeof(float) * (size_t)d);
        else
            memcpy(y + row * d, x + index[row] * d, sizeof(float) * (size_t)d);
    }
}

/* y[t] = the sum of x[index[t, 0]] to x[index[t, k - 1]] in that order, without those below 0;
 * y [n, d], index [n, k]. */
void add_rows(const float *restrict x, const int64_t *restrict index, float *restrict y, int64_t n,
              int64_t k, int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * d >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        float *sum = y + row * d;
        memset(sum, 0, sizeof(float) * (size_t)d);
        for (int64_t i = 0; i < k; i++) {
            int64_t at = index[row * k + i];
            if (at < 0) continue;
            const float *one = x + at * d;
#pragma omp simd
            for (int64_t j = 0; j < d; j++) sum[j] += one[j];
        }
    }
}

/* Rotates the last 2h columns of one head: pairs (2i, 2i + 1) stand at i and h + i afterwards;
 * cos and sin [2h], halves alike or not. */
INLINE void rotate(const float *restrict x, const float *restrict cos, const float *restrict sin,
                   float *restrict y, int64_t h) {
    for (int64_t i = 0; i < h; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        y[i] = a * cos[i] - b * sin[i];
        y[h + i] = b * cos[h + i] + a * sin[h + i];
    }
}

/* The gradient of rotate by x. */
INLINE void rotate_backward(const float *restrict dy, const float *restrict cos,
                            const float *restrict sin, float *restrict dx, int64_t h) {
    for (int64_t i = 0; i < h; i++) {
        dx[2 * i] = dy[i] * cos[i] + dy[h + i] * sin[h + i];
        dx[2 * i + 1] = dy[h + i] * cos[h + i] - dy[i] * sin[i];
    }
}

/* Each head's last 2h columns rotated, the first p as they are: x and y [n, heads, p + 2h], where
 * b rows stand at one position; cos and sin [n / b, 2h]. */
void rotate_queries(const float *restrict x, const float *restrict cos, const float *restrict sin,
                    float *restrict y, int64_t n, int64_t b, int64_t heads, int64_t p, int64_t h,
                    int64_t is_backward, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * heads * (p + 2 * h) >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        const float *c = cos + row / b * 2 * h, *s = sin + row / b * 2 * h;
        for (int64_t head = 0; head < heads; head++) {
            int64_t at = (row * heads + head) * (p + 2 * h);
            memcpy(y + at, x + at, sizeof(float) * (size_t)p);
            if (is_backward)
                rotate_backward(x + at + p, c, s, y + at + p, h);
            else
                rotate(x + at + p, c, s, y + at + p, h);
        }
    }
}

/* Keys [n, heads, p + 2h] and values [n, heads, v] from what both come of, kv [n, heads, p + v],
 * and from one part for all heads that is rotated, shared [n, 2h]. */
void rotate_keys(const float *restrict kv, const float *restrict shared, const float *restrict cos,
                 const float *restrict sin, float *restrict key, float *restrict value, int64_t n,
                 int64_t b, int64_t heads, int64_t p, int64_t h, int64_t v, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * heads * (p + v) >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        const float *in = kv + row * heads * (p + v);
        float *k = key + row * heads * (p + 2 * h), *w = value + row * heads * v, *first = k + p;
        rotate(shared + row * 2 * h, cos + row / b * 2 * h, sin + row / b * 2 * h, first, h);
        for (int64_t head = 0; head < heads; head++) {
            memcpy(k, in, sizeof(float) * (size_t)p);
            if (head) memcpy(k + p, first, sizeof(float) * (size_t)(2 * h));
            memcpy(w, in + p, sizeof(float) * (size_t)v);
            in += p + v, k += p + 2 * h, w += v;
        }
    }
}

/* The gradients of rotate_keys: dkv [n, heads, p + v] and dshared [n, 2h], a sum over the heads. */
void rotate_keys_backward(const float *restrict dkey, const float *restrict dvalue,
                          const float *restrict cos, const float *restrict sin,
                          float *restrict dkv, float *restrict dshared, int64_t n, int64_t b,
                          int64_t heads, int64_t p, int64_t h, int64_t v, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * heads * (p + v) >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        const float *dk = dkey + row * heads * (p + 2 * h), *dw = dvalue + row * heads * v;
        float *out = dkv + row * heads * (p + v), sum[2 * h];
        memset(sum, 0, sizeof(float) * (size_t)(2 * h));
        for (int64_t head = 0; head < heads; head++) {
            memcpy(out, dk, sizeof(float) * (size_t)p);
            memcpy(out + p, dw, sizeof(float) * (size_t)v);
            for (int64_t i = 0; i < 2 * h; i++) sum[i] += dk[p + i];
            dk += p + 2 * h, dw += v, out += p + v;
        }
        rotate_backward(sum, cos + row / b * 2 * h, sin + row / b * 2 * h, dshared + row * 2 * h, h);
    }
}

/* x becomes e^(x - most), row by row, and sum that of each row; no value is above its row's most. */
void exp_rows(float *restrict x, const float *restrict most, float *restrict sum, int64_t n,
              int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n * d >= WORTH_A_THREAD)
    for (int64_t row = 0; row < n; row++) {
        float *values = x + row * d, m = most[row], total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < d; i++) {
            values[i] = exp_of_negative(values[i] - m);
            total += values[i];
        }
        sum[row] = total;
    }
}

/* Adds the sum of squares of x, [n], and n to sums, [2], and raises largest, [1], to |x|; to NaN if
 * there is one. By one thread: it is called for what was just computed. */
void measure(const float *restrict x, float *restrict sums, float *restrict largest, int64_t n,
             int64_t threads) {
    (void)threads;
    float total = 0.0f, most = 0.0f;
    for (int64_t start = 0; start < n; start += 4096) { /* a sum of sums: fp32 is enough */
        int64_t stop = start + 4096 < n ? start + 4096 : n;
        float part = 0.0f;
#pragma omp simd reduction(+ : part) reduction(max : most)
        for (int64_t i = start; i < stop; i++) {
            float value = fabsf(x[i]);
            part += value * value;
            most = value > most ? value : most;
        }
        total += part;
    }
    sums[0] += total;
    sums[1] += (float)n;
    if (isnan(total))
        largest[0] = NAN;
    else if (most > largest[0]) /* NaN compares false and stays */
        largest[0] = most;
}
