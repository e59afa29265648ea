/* y = x W^T + b for few rows of x: every weight is read once, whatever their number, and each row's sums are taken in the same order as
   if it were alone, so that an answer does not depend on its neighbours to the last bit.

   Included once for each format of W: X, GET_VECTOR and NAME are set. x (rows, k) and y (rows, n) are fp32, W is (n, k), b (n) or none, all
   contiguous; k is a multiple of 16. */

/* `count` rows of x and `wide` of W at a time: as many sums as fit into registers. */
#define BLOCK(count, wide)                                                                                                                 \
    for (int64_t row = begin; row < end; row += wide) {                                                                                    \
        vector sum[wide][count];                                                                                                           \
        const X *w[wide];                                                                                                                  \
        for (int c = 0; c < wide; c++) {                                                                                                   \
            w[c] = weight + (row + c < end ? row + c : end - 1) * k;                                                                       \
            for (int r = 0; r < count; r++)                                                                                                \
                sum[c][r] = (vector){0};                                                                                                   \
        }                                                                                                                                  \
        for (int64_t at = 0; at < k; at += LANES) {                                                                                        \
            vector value[count];                                                                                                           \
            for (int r = 0; r < count; r++)                                                                                                \
                value[r] = load_fp32(x + (first + r) * k + at);                                                                            \
            for (int c = 0; c < wide; c++) {                                                                                               \
                vector own = GET_VECTOR(w[c] + at);                                                                                        \
                for (int r = 0; r < count; r++)                                                                                            \
                    sum[c][r] += own * value[r];                                                                                           \
            }                                                                                                                              \
        }                                                                                                                                  \
        for (int c = 0; c < wide && row + c < end; c++)                                                                                    \
            for (int r = 0; r < count; r++)                                                                                                \
                y[(first + r) * n + row + c] = total(sum[c][r]) + (bias ? bias[row + c] : 0.0f);                                           \
    }

static void NAME(few_rows_part)(const X *weight, const float *x, const float *bias, float *y, int64_t rows, int64_t n, int64_t k,
                                int64_t begin, int64_t end)
{
    int64_t first = 0;
    for (; first + 8 <= rows; first += 8)
        BLOCK(8, 2)
    for (; first + 4 <= rows; first += 4)
        BLOCK(4, 4)
    for (; first + 2 <= rows; first += 2)
        BLOCK(2, 4)
    for (; first < rows; first++)
        BLOCK(1, 4)
}

void NAME(few_rows)(const X *weight, const float *x, const float *bias, float *y, int64_t rows, int64_t n, int64_t k, int threads)
{
    int64_t step = 16; /* rows of W at a time, which stay in the cache while groups of rows of x pass over them */
    int64_t parts = (n + step - 1) / step;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        int64_t begin = part * step, end = begin + step < n ? begin + step : n;
        NAME(few_rows_part)(weight, x, bias, y, rows, n, k, begin, end);
    }
}

#undef BLOCK
