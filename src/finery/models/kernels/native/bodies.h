/* Functions over elements of one number format: included once for each, with SCALAR, GET, PUT and NAME defined.
   `threads` is told each time, since the autograd engine's own threads do not know torch's number. Sums are kept in fp32, whatever the format. A row is computed by one thread. */

/* y = act(gate) * up, Shazeer 2020 (arXiv 2002.05202). */
void NAME(gated_forward)(const SCALAR *gate, const SCALAR *up, SCALAR *y, int64_t count, int kind, int threads)
{
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float g = GET(gate[i]);
        float act = kind == SILU ? g * sigmoid(g) : g * sigmoid(gelu_inner(g));
        y[i] = PUT(act * GET(up[i]));
    }
}

void NAME(gated_backward)(const SCALAR *dy, const SCALAR *gate, const SCALAR *up, SCALAR *dgate, SCALAR *dup, int64_t count, int kind, int threads)
{
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float g = GET(gate[i]), d = GET(dy[i]);
        float s = sigmoid(kind == SILU ? g : gelu_inner(g));
        float slope = s + g * s * (1 - s) * (kind == SILU ? 1.0f : gelu_inner_slope(g));
        dup[i] = PUT(d * g * s);
        dgate[i] = PUT(d * GET(up[i]) * slope);
    }
}

/* Rotary positions, Su et al. 2021 (arXiv 2104.09864), halves turned against each other; x (T, H, D) with a stride between
   tokens, y (T, H, D) contiguous, cos and sin (T, D). sign -1 turns back, which is the gradient. */
void NAME(rotary)(const SCALAR *x, int64_t stride_t, int64_t stride_h, SCALAR *y, const float *cos, const float *sin, int64_t tokens,
                  int64_t heads, int64_t dim, float sign, int threads)
{
    int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < heads; h++) {
            const SCALAR *xr = x + t * stride_t + h * stride_h;
            SCALAR *yr = y + (t * heads + h) * dim;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = GET(xr[i]), b = GET(xr[i + half]);
                yr[i] = PUT(a * c[i] - sign * b * s[i]);
                yr[i + half] = PUT(b * c[i + half] + sign * a * s[i + half]);
            }
        }
    }
}

/* Scores (B, Q * G, K) of queries first .. first + Q - 1 with keys low .. low + K - 1 become probabilities in place: query q sees keys
   q - window + 1 .. q. Row q * G + g belongs to query q. lse (B, Q * G) gets the logarithms of the sums, or is read where `known`. */
void NAME(causal_softmax)(SCALAR *scores, float *lse, int64_t stride_b, int64_t batch, int64_t queries, int64_t groups, int64_t keys,
                          int64_t first, int64_t low, int64_t window, float scale, int known, int threads)
{
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < queries * groups; r++) {
            int64_t q = first + r / groups;
            int64_t end = q + 1 - low < keys ? q + 1 - low : keys;
            int64_t begin = q + 1 - window - low > 0 ? q + 1 - window - low : 0;
            SCALAR *row = scores + (b * queries * groups + r) * keys;
            float *sum_of_row = lse + b * stride_b + r;
            if (!known) {
                float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
                for (int64_t k = begin; k < end; k++) {
                    float v = GET(row[k]);
                    most = v > most ? v : most;
                }
#pragma omp simd reduction(+ : sum)
                for (int64_t k = begin; k < end; k++)
                    sum += fast_exp((GET(row[k]) - most) * scale);
                *sum_of_row = most * scale + logf(sum);
            }
            float shift = *sum_of_row;
            for (int64_t k = 0; k < begin; k++)
                row[k] = PUT(0.0f);
#pragma omp simd
            for (int64_t k = begin; k < end; k++)
                row[k] = PUT(fast_exp(GET(row[k]) * scale - shift));
            for (int64_t k = end; k < keys; k++)
                row[k] = PUT(0.0f);
        }
}

/* d scores = p * (dp - delta) * scale, in place of dp; all (rows, keys), delta (rows) per row. */
void NAME(softmax_backward)(const SCALAR *p, SCALAR *dp, const float *delta, int64_t stride_b, int64_t batch, int64_t rows, int64_t keys,
                            float scale, int threads)
{
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < rows; r++) {
            const SCALAR *pr = p + (b * rows + r) * keys;
            SCALAR *dpr = dp + (b * rows + r) * keys;
            float d = delta[b * stride_b + r];
#pragma omp simd
            for (int64_t k = 0; k < keys; k++)
                dpr[k] = PUT(GET(pr[k]) * (GET(dpr[k]) - d) * scale);
        }
}

/* -log p of the target of each row of logits (rows, V); with `grad`, the logits become softmax - onehot. */
void NAME(cross_entropy)(SCALAR *logits, const int64_t *target, float *loss, int64_t rows, int64_t vocabulary, int grad, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        SCALAR *row = logits + r * vocabulary;
        float most = -INFINITY, sum = 0, at_target = GET(row[target[r]]);
#pragma omp simd reduction(max : most)
        for (int64_t v = 0; v < vocabulary; v++) {
            float x = GET(row[v]);
            most = x > most ? x : most;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t v = 0; v < vocabulary; v++)
            sum += fast_exp(GET(row[v]) - most);
        float lse = most + logf(sum);
        loss[r] = lse - at_target;
        if (!grad)
            continue;
#pragma omp simd
        for (int64_t v = 0; v < vocabulary; v++)
            row[v] = PUT(fast_exp(GET(row[v]) - lse));
        row[target[r]] = PUT(expf(at_target - lse) - 1.0f);
    }
}
