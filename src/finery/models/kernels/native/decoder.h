/* New tokens through all layers of a decoder such as Llama's, in one call: RMSNorm, queries, keys and values, rotation, attention to what
   is cached, the way out, the gated MLP, and scores of those tokens that are asked for. All numbers are fp32, weights fp32 or bf16.

   A token may be of any row, and a row may have several: each result is a function of its row alone, to the last bit.
   Shapes: T tokens, H heads of queries, K heads of keys and values, D width of a head, M width of the MLP. */
#include <stdlib.h>

#define BLOCK 128 /* tokens that pass over a panel before the next one is read */

struct matrix { /* weights in panels, see panels.h; bias (outer) or none */
    const void *panels;
    const float *bias;
    int64_t outer, inner, is_bf16;
};

struct layer { /* norms other than those before attention and before the MLP may be none */
    const float *norm_attention, *norm_attended, *norm_mlp, *norm_mlp_done, *norm_query, *norm_key;
    struct matrix in, out, gated, down; /* `in` gives H * D, K * D and K * D numbers; `gated` has panels of gate and up in turn */
    int64_t window, rotation; /* columns that a token sees, its own included; which angles turn its heads, or -1 */
};

struct decoder {
    int64_t hidden, heads, kv_heads, width, rotary, num_layers, is_gelu; /* `rotary` numbers of each head are rotated */
    float eps, scale, cap; /* scores of attention stay between -cap and cap, unless it is 0 */
    const struct layer *layers;
    const float *norm;
    struct matrix head;
};

struct tokens {
    int64_t count, num_rows, num_asked, longest; /* no row has more columns than `longest` */
    const int64_t *row, *column, *position, *asked; /* (T), (T), (T), (num_asked): which tokens' scores are wanted */
    const int64_t *first, *head_stride; /* (num_rows): a row's first column, and how far its heads are apart in the cache */
    float *const *keys, *const *values; /* (num_layers, num_rows): (K, columns, D) each */
    const float *const *cos, *const *sin; /* for each rotation (positions, rotary) */
    float *hidden, *scores; /* (T, hidden), and (num_asked, outputs of the head) */
};

struct work { /* what one thread is at */
    const struct decoder *decoder;
    const struct tokens *tokens;
    const struct layer *layer;
    int64_t number; /* of the layer */
    float *normed, *projected, *attended, *weights; /* (T, hidden), (T, outputs of `in`), (T, the larger of H * D and M), own (longest) */
    const struct matrix *matrix;
    const float *x, *norm;
    float *y;
    const int64_t *which; /* tokens, where not all */
    int64_t count; /* of rows in x */
    int adds;
};

static inline float dot(const float *a, const float *b, int64_t size)
{
    vector sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        sum += load_fp32(a + i) * load_fp32(b + i);
    float rest = total(sum);
    for (; i < size; i++)
        rest += a[i] * b[i];
    return rest;
}

static inline void rms_norm(const float *x, const float *weight, float *y, int64_t size, float eps)
{
    float scale = 1.0f / sqrtf(dot(x, x, size) / size + eps);
    for (int64_t i = 0; i < size; i++)
        y[i] = x[i] * scale * weight[i];
}

/* A token's norm. */
static void norm_token(const void *with, int64_t number)
{
    const struct work *w = with;
    int64_t hidden = w->decoder->hidden, token = w->which ? w->which[number] : number;
    rms_norm(w->tokens->hidden + token * hidden, w->norm, w->normed + number * hidden, hidden, w->decoder->eps);
}

/* A token's hidden state takes the norm of what a layer made of it. */
static void add_normed(const void *with, int64_t number)
{
    const struct work *w = with;
    int64_t size = w->decoder->hidden;
    const float *x = w->normed + number * size;
    float *y = w->tokens->hidden + number * size, scale = 1.0f / sqrtf(dot(x, x, size) / size + w->decoder->eps);
    for (int64_t i = 0; i < size; i++)
        y[i] += x[i] * scale * w->norm[i];
}

static inline int64_t num_panels(const struct matrix *matrix)
{
    return (matrix->outer + PANEL - 1) / PANEL;
}

static inline int64_t num_parts(const struct matrix *matrix, int64_t count)
{
    return num_panels(matrix) * ((count + BLOCK - 1) / BLOCK);
}

static inline void panel(const struct matrix *m, int64_t number, const float *x, int count, float *out)
{
    int64_t at = number * PANEL * m->inner;
    if (m->is_bf16)
        panel_bf16((const bf16 *)m->panels + at, x, m->inner, m->inner, count, out);
    else
        panel_fp32((const float *)m->panels + at, x, m->inner, m->inner, count, out);
}

/* The rows of a part's group; groups are as large as each other, and no larger than ROWS. Returns how many groups there are. */
static inline int64_t group(int64_t begin, int64_t end, int64_t number, int64_t *first, int *count)
{
    int64_t size = end - begin, groups = (size + ROWS - 1) / ROWS;
    *first = begin + size * number / groups;
    *count = (int)(begin + size * (number + 1) / groups - *first);
    return groups;
}

/* y = x W^T + b for the outputs of a panel and a block of rows, or y += the same. */
static void project(const void *with, int64_t part)
{
    const struct work *w = with;
    const struct matrix *m = w->matrix;
    int64_t number = part % num_panels(m), begin = part / num_panels(m) * BLOCK;
    int64_t end = begin + BLOCK < w->count ? begin + BLOCK : w->count;
    int64_t column = number * PANEL, size = column + PANEL < m->outer ? PANEL : m->outer - column, first;
    float out[ROWS * PANEL];
    int count;
    for (int64_t g = 0; g < group(begin, end, g, &first, &count); g++) {
        panel(m, number, w->x + first * m->inner, count, out);
        for (int r = 0; r < count; r++) {
            float *y = w->y + (first + r) * m->outer + column;
            for (int64_t i = 0; i < size; i++)
                y[i] = (w->adds ? y[i] : 0.0f) + out[r * PANEL + i] + (m->bias ? m->bias[column + i] : 0.0f);
        }
    }
}

/* y = act(x G^T) * (x U^T) for the outputs of a panel. */
static void project_gated(const void *with, int64_t part)
{
    const struct work *w = with;
    const struct matrix *m = w->matrix;
    int64_t number = part % num_panels(m), begin = part / num_panels(m) * BLOCK;
    int64_t end = begin + BLOCK < w->count ? begin + BLOCK : w->count;
    int64_t column = number * PANEL, size = column + PANEL < m->outer ? PANEL : m->outer - column, first;
    float gate[ROWS * PANEL], up[ROWS * PANEL];
    int count;
    for (int64_t g = 0; g < group(begin, end, g, &first, &count); g++) {
        panel(m, 2 * number, w->x + first * m->inner, count, gate);
        panel(m, 2 * number + 1, w->x + first * m->inner, count, up);
        for (int r = 0; r < count; r++) {
            float *y = w->y + (first + r) * m->outer + column;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) {
                float a = gate[r * PANEL + i] + (m->bias ? m->bias[column + i] : 0.0f);
                float b = up[r * PANEL + i] + (m->bias ? m->bias[m->outer + column + i] : 0.0f);
                y[i] = a * sigmoid(w->decoder->is_gelu ? gelu_inner(a) : a) * b;
            }
        }
    }
}

static inline void rotate(float *x, const float *cos, const float *sin, int64_t size)
{
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* A token's queries are rotated in place, its keys and values go into the cache. */
static void place(const void *with, int64_t number)
{
    const struct work *w = with;
    const struct decoder *d = w->decoder;
    const struct tokens *t = w->tokens;
    int64_t row = t->row[number], at = w->number * t->num_rows + row;
    int64_t rotation = w->layer->rotation, angle = t->position[number] * d->rotary;
    float *query = w->projected + number * w->layer->in.outer, *key = query + d->heads * d->width, *value = key + d->kv_heads * d->width;
    for (int64_t h = 0; h < d->heads + d->kv_heads; h++) {
        const float *norm = h < d->heads ? w->layer->norm_query : w->layer->norm_key;
        if (norm)
            rms_norm(query + h * d->width, norm, query + h * d->width, d->width, d->eps);
        if (rotation >= 0)
            rotate(query + h * d->width, t->cos[rotation] + angle, t->sin[rotation] + angle, d->rotary);
    }
    for (int64_t h = 0; h < d->kv_heads; h++) {
        int64_t to = h * t->head_stride[row] + t->column[number] * d->width;
        memcpy(t->keys[at] + to, key + h * d->width, d->width * sizeof(float));
        memcpy(t->values[at] + to, value + h * d->width, d->width * sizeof(float));
    }
}

/* A part of y, `wide` vectors from `at` on: the sum of the values (columns, D), each times its weight. */
static inline __attribute__((always_inline)) void weigh_part(const float *weights, const float *values, int64_t columns, int64_t width,
                                                             int64_t at, const int wide, float *y)
{
    vector sum[4] = {0};
    for (int64_t c = 0; c < columns; c++)
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++)
            sum[i] += load_fp32(values + c * width + at + i * LANES) * weights[c];
    memcpy(y + at, sum, wide * sizeof(vector));
}

static inline void weigh(const float *weights, const float *values, int64_t columns, int64_t width, float *y)
{
    int64_t at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES)
        weigh_part(weights, values, columns, width, at, 4, y);
    for (; at + LANES <= width; at += LANES)
        weigh_part(weights, values, columns, width, at, 1, y);
    for (; at < width; at++) {
        float sum = 0;
        for (int64_t c = 0; c < columns; c++)
            sum += weights[c] * values[c * width + at];
        y[at] = sum;
    }
}

/* Scores of a query with `columns` keys become weights, whose sum is given. */
static inline float score(const struct decoder *d, const float *query, const float *keys, int64_t columns, float *weights)
{
    float most = -INFINITY, sum = 0;
    for (int64_t c = 0; c < columns; c++)
        weights[c] = dot(query, keys + c * d->width, d->width) * d->scale;
    if (d->cap)
#pragma omp simd
        for (int64_t c = 0; c < columns; c++)
            weights[c] = d->cap * (2.0f * sigmoid(2.0f * weights[c] / d->cap) - 1.0f);
#pragma omp simd reduction(max : most)
    for (int64_t c = 0; c < columns; c++)
        most = weights[c] > most ? weights[c] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < columns; c++)
        sum += weights[c] = fast_exp(weights[c] - most);
    return sum;
}

/* What the queries of one token find that share a head of keys and values. */
static void attend(const void *with, int64_t number)
{
    const struct work *w = with;
    const struct decoder *d = w->decoder;
    const struct tokens *t = w->tokens;
    int64_t token = number / d->kv_heads, h = number % d->kv_heads, shared = d->heads / d->kv_heads;
    int64_t row = t->row[token], at = w->number * t->num_rows + row, end = t->column[token] + 1;
    int64_t begin = end - w->layer->window > t->first[row] ? end - w->layer->window : t->first[row];
    int64_t from = h * t->head_stride[row] + begin * d->width;
    for (int64_t own = h * shared; own < (h + 1) * shared; own++) {
        const float *query = w->projected + token * w->layer->in.outer + own * d->width;
        float *y = w->attended + (token * d->heads + own) * d->width;
        float sum = score(d, query, t->keys[at] + from, end - begin, w->weights);
        weigh(w->weights, t->values[at] + from, end - begin, d->width, y);
        for (int64_t i = 0; i < d->width; i++)
            y[i] /= sum;
    }
}

/* Hidden states take what `matrix` makes of what was attended to, through a norm where there is one; returns the phase after it. */
static struct phase *give_back(struct work *w, struct phase *phase, const struct matrix *matrix, const float *norm)
{
    w->matrix = matrix, w->x = w->attended, w->y = norm ? w->normed : w->tokens->hidden, w->adds = !norm;
    together(phase++, num_parts(matrix, w->count), project, w);
    w->norm = norm;
    if (norm)
        together(phase++, w->count, add_normed, w);
    return phase;
}

/* One thread's way through all layers. */
static void decode(struct work w, struct phase *phase)
{
    const struct decoder *d = w.decoder;
    for (w.number = 0; w.number < d->num_layers; w.number++) {
        const struct layer *own = w.layer = d->layers + w.number;
        w.norm = own->norm_attention;
        together(phase++, w.count, norm_token, &w);
        w.matrix = &own->in, w.x = w.normed, w.y = w.projected, w.adds = 0;
        together(phase++, num_parts(w.matrix, w.count), project, &w);
        together(phase++, w.count, place, &w);
        together(phase++, w.count * d->kv_heads, attend, &w);
        phase = give_back(&w, phase, &own->out, own->norm_attended);
        w.norm = own->norm_mlp;
        together(phase++, w.count, norm_token, &w);
        w.matrix = &own->gated, w.x = w.normed, w.y = w.attended;
        together(phase++, num_parts(w.matrix, w.count), project_gated, &w);
        phase = give_back(&w, phase, &own->down, own->norm_mlp_done);
    }
    w.norm = d->norm, w.which = w.tokens->asked, w.count = w.tokens->num_asked;
    together(phase++, w.count, norm_token, &w);
    w.matrix = &d->head, w.x = w.normed, w.y = w.tokens->scores, w.adds = 0;
    together(phase++, num_parts(w.matrix, w.count), project, &w);
}

static inline void *room(int64_t size)
{
    return aligned_alloc(64, (size + 63) / 64 * 64);
}

/* How many outputs a panel has. */
int64_t panel_width(void)
{
    return PANEL;
}

/* y (rows, outer) = x W^T + b: one product alone. */
void matrix_product(const struct matrix *matrix, const float *x, float *y, int64_t rows, int threads)
{
    struct work work = {.matrix = matrix, .x = x, .y = y, .count = rows};
    int64_t parts = num_parts(matrix, rows);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t part = 0; part < parts; part++)
        project(&work, part);
}

/* New tokens through all layers; 1 where there is no memory for it. */
int decoder_step(const struct decoder *decoder, const struct tokens *tokens, int threads)
{
    int64_t num_phases = decoder->num_layers * 10 + 2, inner = decoder->heads * decoder->width, widest = 0;
    for (int64_t n = 0; n < decoder->num_layers; n++) {
        const struct layer *own = decoder->layers + n;
        widest = own->in.outer > widest ? own->in.outer : widest;
        inner = own->gated.outer > inner ? own->gated.outer : inner;
    }
    struct phase *phases = room(num_phases * sizeof(struct phase));
    float *normed = room(tokens->count * decoder->hidden * sizeof(float)), *projected = room(tokens->count * widest * sizeof(float));
    float *attended = room(tokens->count * inner * sizeof(float)), *weights = room(threads * tokens->longest * sizeof(float));
    int failed = !phases || !normed || !projected || !attended || !weights;
    if (!failed) {
        memset(phases, 0, num_phases * sizeof(struct phase));
#pragma omp parallel num_threads(threads)
        decode((struct work){.decoder = decoder, .tokens = tokens, .count = tokens->count, .normed = normed, .projected = projected,
                             .attended = attended, .weights = weights + THREAD * tokens->longest}, phases);
    }
    free(phases), free(normed), free(projected), free(attended), free(weights);
    return failed;
}
