/* RMSNorm of rows in one number format into another: included once for each pair, with X, Y, GET_X, PUT_X, GET_Y, PUT_Y and NAME defined.
   See bodies.h for what holds of all functions. */

/* y = x / rms(x) * w, Zhang & Sennrich 2019 (arXiv 1910.07467); 1 / rms is kept for the backward pass. */
void NAME(rms_norm_forward)(const X *x, const float *w, Y *y, float *rstd, int64_t rows, int64_t width, float eps, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const X *xr = x + r * width;
        Y *yr = y + r * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) {
            float v = GET_X(xr[i]);
            sum += v * v;
        }
        float scale = 1.0f / sqrtf(sum / width + eps);
        rstd[r] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            yr[i] = PUT_Y(GET_X(xr[i]) * scale * w[i]);
    }
}

/* dx; and where dw is given, the gradient of w, summed for each thread in a row of its own. */
void NAME(rms_norm_backward)(const X *x, const Y *dy, const float *w, const float *rstd, X *dx, float *dw,
                             int64_t rows, int64_t width, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *own = dw ? dw + THREAD * width : 0;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const X *xr = x + r * width;
            const Y *dyr = dy + r * width;
            X *dxr = dx + r * width;
            float dot = 0, scale = rstd[r];
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++)
                dot += GET_Y(dyr[i]) * w[i] * GET_X(xr[i]);
            dot *= scale * scale / width;
            if (own)
#pragma omp simd
                for (int64_t i = 0; i < width; i++)
                    own[i] += GET_Y(dyr[i]) * GET_X(xr[i]) * scale;
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                dxr[i] = PUT_X(scale * (GET_Y(dyr[i]) * w[i] - GET_X(xr[i]) * dot));
        }
    }
}
