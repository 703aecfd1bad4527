/* FP8 casts for CPUs, one pass each, so that the cast stays small beside a bf16 GEMM.
 *
 * Built on first use by native.py with the system's C compiler; casts.py holds the same arithmetic in torch,
 * and the tests hold both to the same bits. bf16 travels as uint16_t. No fast-math: rounding is the point.
 *
 * Rounding to a grid with p explicit mantissa bits and smallest exponent e0 uses one fp32 addition: adding
 * 1.5 * 2^(23 + e - p) makes the hardware's own nearest-even rounding fall on the grid's unit 2^(e - p),
 * where e is the value's exponent, not below e0 (which covers the subnormals).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

/* Largest power of two that maps amax onto the grid (frexp, so exactly); NaN for NaN and infinity, which must
 * poison the row instead of being clamped into it. */
static inline float row_scale(uint32_t amax_bits, float largest, float floor) {
    float amax = bits_to_float(amax_bits);
    if (amax_bits >= 0x7f800000u) return NAN;
    int exponent;
    frexp((double)largest / (double)(amax > floor ? amax : floor), &exponent);
    return bits_to_float((uint32_t)(126 + exponent) << 23); /* amax * scale lies in (largest / 2, largest] */
}

/* out[r, c] = round_to_grid(x[r, c] * s_r) / s_r with a power-of-two scale s_r for each row: exact in bf16.
 * Rows of x are x_stride apart, rows of out out_stride apart (in elements). */
void fp8pipe_cast_rows_bf16(const uint16_t *x, int64_t x_stride, uint16_t *out, int64_t out_stride, int64_t rows,
                            int64_t cols, int mantissa_bits, int min_exponent, float largest, float floor) {
    const uint32_t floor_bits = (uint32_t)(127 + min_exponent) << 23;
    const uint32_t lift = (uint32_t)(23 - mantissa_bits) << 23;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *from = x + r * x_stride;
        uint16_t *to = out + r * out_stride;
        uint16_t top = 0;
#pragma omp simd reduction(max : top)
        for (int64_t c = 0; c < cols; c++) {
            uint16_t magnitude = from[c] & 0x7fffu;
            top = magnitude > top ? magnitude : top;
        }
        const float scale = row_scale((uint32_t)top << 16, largest, floor), inverse = 1.0f / scale;
#pragma omp simd
        for (int64_t c = 0; c < cols; c++) {
            float v = bits_to_float((uint32_t)from[c] << 16) * scale;
            uint32_t exponent = float_to_bits(v) & 0x7f800000u;
            exponent = exponent > floor_bits ? exponent : floor_bits;
            float magic = bits_to_float((exponent + lift) | 0x00400000u);
            float q = ((v + magic) - magic) * inverse;
            to[c] = (uint16_t)((float_to_bits(q) & 0x7fffffffu) >> 16 | (from[c] & 0x8000u));
        }
    }
}

/* out[i] = decode_e4m3(codes[i]) * scale as bf16, for a power-of-two scale: exact. NaN codes become NaN. */
void fp8pipe_decode_e4m3(const uint8_t *codes, uint16_t *out, int64_t n, float scale) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint32_t code = codes[i];
        uint32_t magnitude = code & 0x7fu;
        uint32_t bits = ((code & 0x80u) << 24) | (magnitude << 20);
        float v = bits_to_float(bits) * 0x1p120f * scale; /* E4M3's exponent field is 120 below fp32's */
        uint32_t result = float_to_bits(v) >> 16;
        out[i] = (uint16_t)(magnitude == 0x7fu ? 0x7fc0u : result);
    }
}
