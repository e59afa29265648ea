/* Elementwise work of a transformer in one pass over memory each, for fp32 and bf16; see native.py for how it is built. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

enum { SILU = 0, GELU_TANH = 1 };

typedef uint16_t bf16;

static inline float from_bf16(bf16 x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, ties to even; what is no number stays none. */
static inline bf16 to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

/* e^x to 2e-7 relative: x = n ln 2 + r, a polynomial for e^r (Cephes, expf), n into the exponent. */
static inline float fast_exp(float x)
{
    float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t exponent = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &exponent, 4);
    return x != x ? x : p * power;
}

static inline float sigmoid(float x)
{
    return 1.0f / (1.0f + fast_exp(-x));
}

/* gelu(x) = x sigmoid(inner(x)) in the tanh form of Hendrycks & Gimpel 2016 (arXiv 1606.08415), as tanh(z) = 2 sigmoid(2 z) - 1. */
static inline float gelu_inner(float x)
{
    return 1.5957691216057308f * (x + 0.044715f * x * x * x);
}

static inline float gelu_inner_slope(float x)
{
    return 1.5957691216057308f * (1.0f + 0.134145f * x * x);
}

#define SAME(x) (x)

#define X float
#define GET_X SAME
#define PUT_X SAME
#define Y float
#define GET_Y SAME
#define PUT_Y SAME
#define NAME(name) name##_fp32
#include "norms.h"
#undef Y
#undef GET_Y
#undef PUT_Y
#undef NAME

/* what mixed precision takes: rows in fp32, results for products in bf16 */
#define Y bf16
#define GET_Y from_bf16
#define PUT_Y to_bf16
#define NAME(name) name##_mixed_fp32
#include "norms.h"
#undef X
#undef GET_X
#undef PUT_X
#undef NAME

#define X bf16
#define GET_X from_bf16
#define PUT_X to_bf16
#define NAME(name) name##_bf16
#include "norms.h"
#undef NAME
#undef X
#undef GET_X
#undef PUT_X

#define SCALAR float
#define GET(x) (x)
#define PUT(x) (x)
#define NAME(name) name##_fp32
#include "bodies.h"
#undef SCALAR
#undef GET
#undef PUT
#undef NAME

#define SCALAR bf16
#define GET(x) from_bf16(x)
#define PUT(x) to_bf16(x)
#define NAME(name) name##_bf16
#include "bodies.h"
#undef SCALAR
#undef GET
#undef PUT
#undef NAME

/* A vector is what one register holds: compilers make slow work of larger ones. ROWS of x have sums, two vectors each, in registers. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#else
#define LANES 4
#define ROWS 6
#endif
#define PANEL (2 * LANES)
#define AHEAD (64 * PANEL) /* what is read from memory is asked for so much earlier */

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

static inline vector load_fp32(const float *from)
{
    vector value;
    memcpy(&value, from, sizeof value);
    return value;
}

typedef float four __attribute__((vector_size(16)));

/* Halves are added until there are four numbers. */
static inline float total(vector value)
{
    four part[LANES / 4];
    memcpy(part, &value, sizeof value);
#pragma GCC unroll 2
    for (int size = LANES / 8; size; size /= 2)
#pragma GCC unroll 2
        for (int i = 0; i < size; i++)
            part[i] += part[i + size];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

static inline void two_fp32(const float *from, vector *low, vector *high)
{
    memcpy(low, from, sizeof *low);
    memcpy(high, from + LANES, sizeof *high);
}

static inline void two_bf16(const bf16 *from, vector *low, vector *high)
{
    words both, first, second;
    memcpy(&both, from, sizeof both);
    first = both << 16;
    second = both & 0xffff0000u;
    memcpy(low, &first, sizeof first);
    memcpy(high, &second, sizeof second);
}

#define X float
#define GET_TWO two_fp32
#define PLACE(i) (i)
#define NAME(name) name##_fp32
#include "panels.h"
#undef X
#undef GET_TWO
#undef PLACE
#undef NAME

#define X bf16
#define GET_TWO two_bf16
#define PLACE(i) ((i) % LANES * 2 + (i) / LANES)
#define NAME(name) name##_bf16
#include "panels.h"

#include "team.h"
#include "decoder.h"
