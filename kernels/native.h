/* What the compiled operators share (native.c, attention.c, expert_ffn.c).
 *
 * All of it is fp32. NaN and infinity go through as in torch.
 */

#ifndef PRETRAIN_NATIVE_H
#define PRETRAIN_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { WORTH_A_THREAD = 32768 }; /* values, below which waking one takes longer */

#define INLINE static inline __attribute__((always_inline))

/* e^x for x in [-87.3, 88.3] or NaN: 2^k times a polynomial of what is left, |r| <= ln 2 / 2, with
 * Cephes' coefficients; within 2 ulp. */
INLINE float exp_in_range(float x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float k = (x * 1.44269504088896341f + shift) - shift;
    float r = x - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    union { int32_t bits; float value; } power = {((int32_t)k + 127) << 23};
    return p * power.value;
}

/* e^x for x <= 0 or NaN; 0 where torch has numbers below the normal ones. */
INLINE float exp_of_negative(float x) {
    float bounded = x < -87.3f ? -87.3f : x; /* NaN compares false and stays */
    float result = exp_in_range(bounded);
    return x < -87.3f ? 0.0f : result;
}

/* 1 / (1 + e^-x); below -88.3 it stays at 5e-39. */
INLINE float sigmoid(float x) {
    float bounded = x > 87.3f ? 87.3f : x;
    bounded = bounded < -88.3f ? -88.3f : bounded;
    return 1.0f / (1.0f + exp_in_range(-bounded));
}

/* Of native.c, for expert_ffn.c. */
void swiglu(const float *restrict hidden, const float *restrict weight, float *restrict a,
            int64_t n, int64_t f, int64_t threads);
void swiglu_backward(const float *restrict hidden, const float *restrict weight, const float *da,
                     float *a, float *restrict dhidden, float *restrict dweight, int64_t n,
                     int64_t f, int64_t threads);

#endif
