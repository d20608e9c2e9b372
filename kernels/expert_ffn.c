/* The experts of a layer, each as a whole on one thread: expert_ffn.py's loop without Python, and
 * without threads that wait for each other after each of 96 small products.
 *
 * Products are those of the BLAS that torch has (native.py gives its address): inside a parallel
 * region MKL stays on its thread. An expert's rows, matrices and sums are nobody else's, so no bit
 * depends on who takes which.
 *
 * Tokens stand expert by expert, rows start[e] to start[e + 1] are of expert e; d columns (model),
 * f columns (FFN width); arrays are dense and row by row; scratch is of threads times as many rows
 * as the expert with most tokens has.
 */

#include "native.h"

#include <omp.h>

typedef void (*product_t)(const char *, const char *, const int *, const int *, const int *,
                          const float *, const float *, const int *, const float *, const int *,
                          const float *, float *, const int *);

/* c = op(a) op(b) + beta c with c [m, n] and k terms to a sum; flips: whether a, [k, m], and b,
 * [n, k], stand the other way round. BLAS reads columns first: it is given the transposed product. */
INLINE void product(product_t blas, int flip_a, int flip_b, int64_t m, int64_t n, int64_t k,
                    const float *a, const float *b, float beta, float *c) {
    int rows = (int)n, columns = (int)m, terms = (int)k;
    int step_a = (int)(flip_a ? m : k), step_b = (int)(flip_b ? k : n);
    float one = 1.0f;
    blas(flip_b ? "T" : "N", flip_a ? "T" : "N", &rows, &columns, &terms, &one, b, &step_b, a,
         &step_a, &beta, c, &rows);
}

/* y = (silu(gate) up weight) fc2^T with hidden = [gate, up] = x fc1^T, which is kept; fc1 [2f, d]
 * and fc2 [d, f] of each expert, weight [T], hidden [T, 2f], x and y [T, d], scratch [., f]. */
void expert_ffn(void *blas, const float *x, const float *weight, const int64_t *start,
                const float **fc1, const float **fc2, float *hidden, float *y, float *scratch,
                int64_t most, int64_t experts, int64_t d, int64_t f, int64_t threads) {
    product_t by = (product_t)blas;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t e = 0; e < experts; e++) {
        int64_t first = start[e], n = start[e + 1] - first;
        if (!n) continue;
        float *a = scratch + omp_get_thread_num() * most * f, *h = hidden + first * 2 * f;
        product(by, 0, 1, n, 2 * f, d, x + first * d, fc1[e], 0.0f, h);
        swiglu(h, weight + first, a, n, f, 1);
        product(by, 0, 1, n, d, f, a, fc2[e], 0.0f, y + first * d);
    }
}

/* The gradients of expert_ffn from that by y: dx, dweight, and of the matrices dfc1 and dfc2, to
 * which they are added if adds, otherwise they are written; scratch [., 3f]. */
void expert_ffn_backward(void *blas, const float *x, const float *weight, const float *hidden,
                         const float *dy, const int64_t *start, const float **fc1,
                         const float **fc2, float **dfc1, float **dfc2, float *dx, float *dweight,
                         float *scratch, int64_t most, int64_t experts, int64_t d, int64_t f,
                         int64_t adds, int64_t threads) {
    product_t by = (product_t)blas;
    float old = adds ? 1.0f : 0.0f; /* at 0 BLAS reads nothing */
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t e = 0; e < experts; e++) {
        int64_t first = start[e], n = start[e + 1] - first;
        if (!n && !adds) {
            memset(dfc1[e], 0, sizeof(float) * (size_t)(2 * f * d));
            memset(dfc2[e], 0, sizeof(float) * (size_t)(d * f));
        }
        if (!n) continue;
        float *a = scratch + omp_get_thread_num() * most * 3 * f, *dh = a + most * f;
        const float *given = dy + first * d;
        product(by, 0, 0, n, f, d, given, fc2[e], 0.0f, a); /* the gradient by a, then a itself */
        swiglu_backward(hidden + first * 2 * f, weight + first, a, a, dh, dweight + first, n, f, 1);
        product(by, 1, 0, d, f, n, given, a, old, dfc2[e]);
        product(by, 0, 0, n, d, 2 * f, dh, fc1[e], 0.0f, dx + first * d);
        product(by, 1, 0, 2 * f, d, n, dh, x + first * d, old, dfc1[e]);
    }
}
