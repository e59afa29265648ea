/* Products with weights (outer, inner) that lie in panels of PANEL outputs: for each number in, the weights of all PANEL outputs side by side.
   Sums run over the numbers in, one after another, in lanes of their own: a row's sums are the same whatever the other rows are.

   bf16 lies in pairs: the first of two is of the panel's first half, the second of its second, so that a shift and a mask part them.

   Included once for each format of the weights: X, GET_TWO, PLACE (of an output in its panel) and NAME are set. */

/* Weights (outer, inner) in panels that lie `apart` from each other; the last one is filled up with zeros. */
void NAME(pack)(const X *weight, X *panels, int64_t outer, int64_t inner, int64_t apart, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < outer; first += PANEL) {
        X *panel = panels + first / PANEL * apart;
        for (int64_t at = 0; at < inner; at++)
            for (int64_t i = 0; i < PANEL; i++)
                panel[at * PANEL + PLACE(i)] = first + i < outer ? weight[(first + i) * inner + at] : 0;
    }
}

/* out (count, PANEL) of x (count, inner), whose rows lie `stride` apart. */
static inline __attribute__((always_inline)) void NAME(panel_of)(const X *weight, const float *x, int64_t stride, int64_t inner,
                                                                 const int count, float *out)
{
    vector sum[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++)
        sum[r][0] = sum[r][1] = (vector){0};
    for (int64_t at = 0; at < inner; at++, weight += PANEL) {
        vector low, high;
        __builtin_prefetch(weight + AHEAD);
        GET_TWO(weight, &low, &high);
#pragma GCC unroll 16
        for (int r = 0; r < count; r++) {
            float value = x[r * stride + at];
            sum[r][0] += low * value;
            sum[r][1] += high * value;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < count; r++)
        memcpy(out + r * PANEL, sum[r], sizeof sum[r]);
}

#define COUNT(n) case n: NAME(panel_of)(weight, x, stride, inner, n, out); break;

/* The same for a count up to ROWS that is not known before. */
static void NAME(panel)(const X *weight, const float *x, int64_t stride, int64_t inner, int count, float *out)
{
    switch (count) {
    COUNT(1) COUNT(2) COUNT(3) COUNT(4) COUNT(5) COUNT(6)
#if ROWS == 12
    COUNT(7) COUNT(8) COUNT(9) COUNT(10) COUNT(11) COUNT(12)
#endif
    }
}

#undef COUNT
