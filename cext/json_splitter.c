#include "json_splitter.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* QEMU's own limits (qobject/json-streamer.c), less the tokens of an id: it gets one of ours. */
#define MAX_NESTING 1024
#define MAX_TOKENS ((2u << 20) - 4)

#define RECORD_COUNT(max) ((size_t)(max) * RF_RECORD_SIZE)

enum lexer_state {
    START,
    RECOVERY, /* after a stray byte: skips to a structural character, a control byte, FE or FF */
    STRING,
    STRING_ESCAPE,
    KEYWORD,
    SIGN,
    ZERO,
    DIGITS,
    POINT,
    FRACTION,
    EXP,
    EXP_SIGN,
    EXP_DIGITS,
};

enum token_type { LCURLY, RCURLY, LSQUARE, RSQUARE, COLON, COMMA, NUMBER_TOKEN, KEYWORD_TOKEN, STRING_TOKEN };

/* What the grammar takes next. */
enum expect { VALUE, VALUE_OR_END, KEY, KEY_OR_END, COLON_NEXT, COMMA_OR_END };

enum member { M_EXECUTE, M_EXEC_OOB, M_RETURN, M_ERROR, M_EVENT, M_GREETING, M_ARGUMENTS, M_ID, M_OTHER };

static const char *const member_names[M_OTHER] = {"execute", "exec-oob", "return",    "error",
                                                  "event",   "QMP",      "arguments", "id"};

/* A key as it stands in the message, from its opening quote to behind its closing one. */
struct key {
    size_t begin, end;
    uint64_t hash; /* of its characters */
};

struct rf_splitter {
    size_t max_bytes;
    bool lenient;

    /* lexer */
    enum lexer_state state;
    size_t pos;   /* next byte to look at */
    size_t token; /* where the current token begins */
    char quote;
    bool plain; /* the current string has neither escapes nor bytes above 7F */

    /* the value that is being read; offsets are into the buffer */
    bool inside;
    size_t begin;
    unsigned tokens;
    int braces, brackets;
    enum rf_json_status status;
    size_t wrong, wrong_end;

    /* grammar: one entry for each open bracket */
    enum expect expect;
    int depth;
    bool is_object[MAX_NESTING + 1];
    size_t first_key[MAX_NESTING + 1]; /* index into keys of the object's first */
    struct key *keys;                  /* of all open objects, the innermost one's last */
    size_t key_count, key_room;
    uint64_t secret; /* that hashes begin with, so that nobody can choose keys of which many are equal */

    /* members of the outermost object */
    int shape;
    enum member member;
    size_t member_key;
    size_t member_value;
    size_t previous_end; /* of the member before */
    bool cut_open;       /* the id is the first member: the cut ends where the next key begins */
    int64_t at[RF_RECORD_SIZE];
};

rf_splitter *rf_splitter_new(size_t max_bytes, int lenient) {
    rf_splitter *s = calloc(1, sizeof *s);
    if (s) {
        s->max_bytes = max_bytes;
        s->lenient = lenient != 0;
        if (getrandom(&s->secret, sizeof s->secret, GRND_NONBLOCK) < 0) {
            s->secret = (uintptr_t)s;
        }
    }
    return s;
}

void rf_splitter_free(rf_splitter *s) {
    if (s) {
        free(s->keys);
        free(s);
    }
}

int rf_splitter_skips(const rf_splitter *s) { return s->state == RECOVERY; }

void rf_splitter_skip(rf_splitter *s) { s->state = RECOVERY; }

/* strings */

static int hex4(const unsigned char *p, const unsigned char *end) {
    int value = 0;
    if (end - p < 4) {
        return -1;
    }
    for (int i = 0; i < 4; i++) {
        int c = p[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) {
            return -1;
        }
        value = value << 4 | digit;
    }
    return value;
}

static bool valid_codepoint(int cp) {
    return cp >= 0 && cp <= 0x10FFFF && !(cp >= 0xFDD0 && cp <= 0xFDEF) && (cp & 0xFFFE) != 0xFFFE &&
           !(cp >= 0xD800 && cp <= 0xDFFF);
}

/* Reads one UTF-8 sequence at *p. U+0000 is C0 80, as in QEMU's modified UTF-8 (util/unicode.c). */
static int utf8(const unsigned char **p, const unsigned char *end) {
    static const int smallest[] = {0x80, 0x800, 0x10000};
    int byte = *(*p)++;
    if (byte < 0x80) {
        return byte;
    }
    int more = byte >= 0xC0 && byte < 0xE0   ? 1
               : byte >= 0xE0 && byte < 0xF0 ? 2
               : byte >= 0xF0 && byte < 0xF8 ? 3
                                             : 0;
    if (more == 0 || end - *p < more) {
        return -1;
    }
    int cp = byte & (0x3F >> more);
    for (int i = 0; i < more; i++) {
        int next = *(*p)++;
        if ((next & 0xC0) != 0x80) {
            return -1;
        }
        cp = cp << 6 | (next & 0x3F);
    }
    return cp < smallest[more - 1] && !(cp == 0 && more == 1) ? -1 : cp;
}

/* Reads one character of a string's inside at *p; its code point, or -1 where QEMU's parser finds none. */
static int character(const unsigned char **p, const unsigned char *end) {
    int cp;
    if (**p != '\\') {
        cp = utf8(p, end);
        return valid_codepoint(cp) ? cp : -1;
    }
    if (end - *p < 2) {
        return -1;
    }
    int escaped = (*p)[1];
    *p += 2;
    switch (escaped) {
    case '"':
    case '\'':
    case '\\':
    case '/':
        return escaped;
    case 'b':
        return '\b';
    case 'f':
        return '\f';
    case 'n':
        return '\n';
    case 'r':
        return '\r';
    case 't':
        return '\t';
    case 'u':
        cp = hex4(*p, end);
        if (cp < 0) {
            return -1;
        }
        *p += 4;
        if (cp >= 0xD800 && cp <= 0xDBFF && end - *p >= 6 && (*p)[0] == '\\' && (*p)[1] == 'u') {
            int low = hex4(*p + 2, end);
            if (low < 0xDC00 || low > 0xDFFF) {
                return -1;
            }
            *p += 6;
            cp = 0x10000 + ((cp & 0x3FF) << 10 | (low & 0x3FF));
        }
        return valid_codepoint(cp) ? cp : -1;
    default:
        return -1;
    }
}

/* Whether the string between its quotes is valid; *extended: it has U+0000 spelt C0 80, or an escaped
 * apostrophe. */
static bool valid_string(const char *inside, size_t len, bool *extended) {
    const unsigned char *p = (const unsigned char *)inside, *end = p + len;
    while (p < end) {
        bool raw = *p != '\\';
        int cp = character(&p, end);
        if (cp < 0) {
            return false;
        }
        *extended = *extended || (raw ? cp == 0 : p[-1] == '\'');
    }
    return true;
}

static int compare_strings(const char *a, size_t a_len, const char *b, size_t b_len) {
    const unsigned char *p = (const unsigned char *)a, *p_end = p + a_len;
    const unsigned char *q = (const unsigned char *)b, *q_end = q + b_len;
    while (p < p_end && q < q_end) {
        int x = character(&p, p_end), y = character(&q, q_end);
        if (x != y) {
            return x < y ? -1 : 1;
        }
    }
    return (p < p_end) - (q < q_end);
}

/* keys */

static uint64_t hash_string(uint64_t hash, const char *text, size_t len, bool plain) {
    const unsigned char *p = (const unsigned char *)text, *end = p + len;
    while (p < end) {
        hash = (hash ^ (uint64_t)(plain ? *p++ : character(&p, end))) * 0x9E3779B97F4A7C15u;
    }
    return hash ^ hash >> 32;
}

static bool push_key(rf_splitter *s, const char *buf, size_t begin, size_t end) {
    if (s->key_count == s->key_room) {
        size_t room = s->key_room ? 2 * s->key_room : 16;
        struct key *keys = realloc(s->keys, room * sizeof *keys);
        if (!keys) {
            return false;
        }
        s->keys = keys;
        s->key_room = room;
    }
    s->keys[s->key_count++] =
        (struct key){begin, end, hash_string(s->secret, buf + begin + 1, end - begin - 2, s->plain)};
    return true;
}

static int compare_keys(const void *a, const void *b, void *buf) {
    const struct key *x = a, *y = b;
    const char *text = buf;
    if (x->hash != y->hash) {
        return x->hash < y->hash ? -1 : 1;
    }
    return compare_strings(text + x->begin + 1, x->end - x->begin - 2, text + y->begin + 1,
                           y->end - y->begin - 2);
}

/* Sorting by hash: long keys that begin alike are compared in one step. */
static bool has_equal_keys(struct key *keys, size_t count, const char *buf) {
    if (count > 8) {
        qsort_r(keys, count, sizeof *keys, compare_keys, (void *)(uintptr_t)buf);
        for (size_t i = 1; i < count; i++) {
            if (compare_keys(&keys[i - 1], &keys[i], (void *)(uintptr_t)buf) == 0) {
                return true;
            }
        }
        return false;
    }
    for (size_t i = 1; i < count; i++) {
        for (size_t j = 0; j < i; j++) {
            if (compare_keys(&keys[i], &keys[j], (void *)(uintptr_t)buf) == 0) {
                return true;
            }
        }
    }
    return false;
}

/* members of the outermost object */

static void member_key(rf_splitter *s, const char *buf, size_t begin, size_t end) {
    s->member_key = begin;
    for (int i = 0; i < M_OTHER; i++) {
        const char *name = member_names[i];
        size_t len = strlen(name);
        if (s->plain ? end - begin - 2 == len && memcmp(buf + begin + 1, name, len) == 0
                     : compare_strings(buf + begin + 1, end - begin - 2, name, len) == 0) {
            s->member = (enum member)i;
            if (s->cut_open) {
                s->at[RF_AT_CUT_END] = (int64_t)(begin - s->begin);
                s->cut_open = false;
            }
            return;
        }
    }
    if (s->cut_open) {
        s->at[RF_AT_CUT_END] = (int64_t)(begin - s->begin);
        s->cut_open = false;
    }
    s->member = M_OTHER;
}

static void member_value(rf_splitter *s, enum token_type type, size_t begin) {
    bool usual = true;
    s->member_value = begin;
    switch (s->member) {
    case M_EXECUTE:
    case M_EXEC_OOB:
        usual = type == STRING_TOKEN;
        break;
    case M_ARGUMENTS:
        usual = type == LCURLY;
        break;
    case M_OTHER:
        usual = false;
        break;
    default:
        break;
    }
    if (!usual) {
        s->shape |= RF_UNUSUAL;
    }
}

static void member_end(rf_splitter *s, size_t end) {
    int64_t from = (int64_t)(s->member_value - s->begin), to = (int64_t)(end - s->begin);
    switch (s->member) {
    case M_ARGUMENTS:
        s->at[RF_AT_ARGUMENTS] = from;
        s->at[RF_AT_ARGUMENTS_END] = to;
        break;
    case M_ID:
        s->at[RF_AT_ID] = from;
        s->at[RF_AT_ID_END] = s->at[RF_AT_CUT_END] = to;
        s->cut_open = s->previous_end == 0;
        s->at[RF_AT_CUT] = (int64_t)((s->cut_open ? s->member_key : s->previous_end) - s->begin);
        break;
    case M_OTHER:
        break;
    default:
        if (s->shape & RF_VERB_MASK) {
            s->shape |= RF_UNUSUAL;
        } else {
            s->shape |= (int)s->member + 1;
            s->at[RF_AT_VERB] = from;
            s->at[RF_AT_VERB_END] = to;
        }
        break;
    }
    s->previous_end = end;
}

/* grammar */

static void wrong(rf_splitter *s, enum rf_json_status status, size_t begin, size_t end) {
    if (s->status == RF_JSON_VALUE) {
        s->status = status;
        s->wrong = begin;
        s->wrong_end = end;
    }
}

static void open_container(rf_splitter *s, bool object) {
    s->depth++;
    s->is_object[s->depth] = object;
    s->first_key[s->depth] = s->key_count;
    s->expect = object ? KEY_OR_END : VALUE_OR_END;
}

static void end_of_value(rf_splitter *s, size_t end) {
    s->expect = COMMA_OR_END;
    if (s->depth == 1 && s->is_object[1]) {
        member_end(s, end);
    }
}

static bool known_keyword(const char *text, size_t len) {
    return (len == 4 && memcmp(text, "true", 4) == 0) || (len == 4 && memcmp(text, "null", 4) == 0) ||
           (len == 5 && memcmp(text, "false", 5) == 0);
}

/* One token of a value that is well-formed so far. Returns false without memory. */
static bool step(rf_splitter *s, const char *buf, enum token_type type, size_t begin, size_t end) {
    bool object = s->depth > 0 && s->is_object[s->depth];
    bool extended = false;

    if (type == STRING_TOKEN) {
        if (!s->plain && !s->lenient && !valid_string(buf + begin + 1, end - begin - 2, &extended)) {
            wrong(s, RF_JSON_SYNTAX, begin, end);
            return true;
        }
        if (buf[begin] == '\'' || extended) {
            s->shape |= RF_EXTENDED;
        }
    }

    switch (s->expect) {
    case KEY_OR_END:
    case KEY:
        if (type == RCURLY && s->expect == KEY_OR_END) {
            s->depth--;
            end_of_value(s, end);
            if (s->depth == 0) {
                s->shape |= RF_EMPTY;
            }
            return true;
        }
        if (type != STRING_TOKEN) {
            break;
        }
        if (s->depth == 1) {
            member_key(s, buf, begin, end);
        }
        s->expect = COLON_NEXT;
        return s->lenient || push_key(s, buf, begin, end);
    case COLON_NEXT:
        if (type != COLON) {
            break;
        }
        s->expect = VALUE;
        return true;
    case COMMA_OR_END:
        if (type == COMMA) {
            s->expect = object ? KEY : VALUE;
            return true;
        }
        if (type != (object ? RCURLY : RSQUARE)) {
            break;
        }
        if (object && !s->lenient) {
            size_t first = s->first_key[s->depth];
            if (has_equal_keys(s->keys + first, s->key_count - first, buf)) {
                wrong(s, RF_JSON_DUPLICATE, begin, end);
                return true;
            }
            s->key_count = first;
        }
        s->depth--;
        end_of_value(s, end);
        return true;
    case VALUE_OR_END:
        if (type == RSQUARE) {
            s->depth--;
            end_of_value(s, end);
            return true;
        }
        /* fall through */
    case VALUE:
        if (type == RCURLY || type == RSQUARE || type == COLON || type == COMMA) {
            break;
        }
        if (type == KEYWORD_TOKEN && !s->lenient && !known_keyword(buf + begin, end - begin)) {
            break;
        }
        if (s->depth == 1 && object) {
            member_value(s, type, begin);
        } else if (s->depth == 0 && type != LCURLY) {
            s->shape |= RF_NOT_OBJECT;
        }
        if (type == LCURLY || type == LSQUARE) {
            open_container(s, type == LCURLY);
        } else {
            end_of_value(s, end);
        }
        return true;
    }
    wrong(s, RF_JSON_SYNTAX, begin, end);
    return true;
}

/* Ends the value that is being read and writes its record. */
static void finish(rf_splitter *s, size_t end, int64_t *record) {
    if (s->status == RF_JSON_VALUE) {
        memcpy(record, s->at, sizeof s->at);
        record[RF_AT_SHAPE] = s->shape;
    } else {
        memset(record, 0, sizeof s->at);
        record[RF_AT_VERB] = (int64_t)(s->wrong - s->begin);
        record[RF_AT_VERB_END] = (int64_t)(s->wrong_end - s->begin);
    }
    record[RF_AT_STATUS] = s->status;
    record[RF_AT_BEGIN] = (int64_t)s->begin;
    record[RF_AT_END] = (int64_t)end;
    s->inside = false;
    s->key_count = 0;
}

static void open_value(rf_splitter *s, size_t begin) {
    if (s->inside) {
        return;
    }
    s->inside = true;
    s->begin = begin;
    s->tokens = 0;
    s->braces = s->brackets = 0;
    s->status = RF_JSON_VALUE;
    s->expect = VALUE;
    s->depth = 0;
    s->shape = 0;
    s->previous_end = 0;
    s->cut_open = false;
    memset(s->at, 0, sizeof s->at);
}

/* One token. Returns 1 if it ends a value, 0 if not, -1 without memory. */
static int take(rf_splitter *s, const char *buf, enum token_type type, size_t end, int64_t *record) {
    size_t begin = s->token;
    bool over = false;

    switch (type) {
    case LCURLY:
        s->braces++;
        break;
    case RCURLY:
        s->braces--;
        break;
    case LSQUARE:
        s->brackets++;
        break;
    case RSQUARE:
        s->brackets--;
        break;
    default:
        break;
    }
    if (++s->tokens > MAX_TOKENS) {
        s->status = RF_JSON_TOO_MANY;
        over = true;
    } else if (s->braces + s->brackets > MAX_NESTING) {
        s->status = RF_JSON_TOO_DEEP;
        over = true;
    }
    if (over) {
        s->wrong = begin;
        s->wrong_end = end;
    } else if (s->status == RF_JSON_VALUE && !step(s, buf, type, begin, end)) {
        return -1;
    }
    /* As QEMU counts: the value is over when no bracket is open, or one was closed too many. */
    if (!over && (s->braces > 0 || s->brackets > 0) && s->braces >= 0 && s->brackets >= 0) {
        return 0;
    }
    finish(s, end, record);
    return 1;
}

/* lexer */

static bool is_digit(unsigned char c) { return c >= '0' && c <= '9'; }

/* The state after c inside a number or keyword, or START if c is not part of it, or RECOVERY if nothing
 * allows it. */
static enum lexer_state in_word(const rf_splitter *s, unsigned char c) {
    switch (s->state) {
    case KEYWORD:
        return c >= 'a' && c <= 'z' ? KEYWORD : START;
    case SIGN:
        if (s->lenient && c >= 'a' && c <= 'z') {
            return KEYWORD;
        }
        return c == '0' ? ZERO : is_digit(c) ? DIGITS : RECOVERY;
    case ZERO:
        /* QEMU's lexer has no exponent here either */
        return c == '.' ? POINT : is_digit(c) ? RECOVERY : START;
    case DIGITS:
        return is_digit(c) ? DIGITS : c == '.' ? POINT : c == 'e' || c == 'E' ? EXP : START;
    case POINT:
        return is_digit(c) ? FRACTION : RECOVERY;
    case FRACTION:
        return is_digit(c) ? FRACTION : c == 'e' || c == 'E' ? EXP : START;
    case EXP:
        return is_digit(c) ? EXP_DIGITS : c == '+' || c == '-' ? EXP_SIGN : RECOVERY;
    case EXP_SIGN:
        return is_digit(c) ? EXP_DIGITS : RECOVERY;
    default:
        return is_digit(c) ? EXP_DIGITS : START;
    }
}

/* Where the string that pos stands in stops being ordinary: its closing quote, a backslash, a byte that no
 * string has, or limit. */
static size_t ordinary(rf_splitter *s, const char *buf, size_t pos, size_t limit) {
    unsigned char quote = (unsigned char)s->quote;
    unsigned char all = 0;
    while (pos < limit) {
        unsigned char c = (unsigned char)buf[pos];
        if (c == quote || c == '\\' || c < 0x20 || c >= 0xFE) {
            break;
        }
        all |= c;
        pos++;
    }
    if (all & 0x80) {
        s->plain = false;
    }
    return pos;
}

static void stray(rf_splitter *s, enum rf_json_status status, size_t end, int64_t *record) {
    s->status = status;
    s->wrong = s->token;
    s->wrong_end = end;
    finish(s, end, record);
    s->state = RECOVERY;
}

/* Moves every offset back by n, for a buffer that loses its first n bytes. */
static void rebase(rf_splitter *s, size_t n) {
    if (n == 0) {
        return; /* a long value that comes in small pieces must not cost all its keys at each */
    }
    s->pos -= n;
    s->token = s->token >= n ? s->token - n : 0;
    s->begin = s->begin >= n ? s->begin - n : 0;
    s->wrong = s->wrong >= n ? s->wrong - n : 0;
    s->wrong_end = s->wrong_end >= n ? s->wrong_end - n : 0;
    s->member_key = s->member_key >= n ? s->member_key - n : 0;
    s->member_value = s->member_value >= n ? s->member_value - n : 0;
    s->previous_end = s->previous_end >= n ? s->previous_end - n : 0;
    for (size_t i = 0; i < s->key_count; i++) {
        s->keys[i].begin -= n;
        s->keys[i].end -= n;
    }
}

int rf_splitter_scan(rf_splitter *s, const char *buf, size_t len, int64_t *records, int max, size_t *keep) {
    int count = 0;

    while (s->pos < len && count < max) {
        int64_t *record = records + RECORD_COUNT(count);
        unsigned char c = (unsigned char)buf[s->pos];
        int taken = 0;

        if (s->inside && s->pos - s->begin >= s->max_bytes) {
            if (s->state == START) {
                s->token = s->pos;
            }
            stray(s, RF_JSON_TOO_LARGE, s->pos, record);
            count++;
            continue;
        }
        switch (s->state) {
        case RECOVERY:
            if ((c < 0x20 && c != '\t') || c >= 0xFE || (c && strchr("[]{}:,", c))) {
                s->state = START;
            } else {
                s->pos++;
            }
            continue;
        case STRING: {
            size_t limit = s->begin + s->max_bytes;
            s->pos = ordinary(s, buf, s->pos, len < limit ? len : limit);
            if (s->pos == len || s->pos == limit) {
                continue;
            }
            c = (unsigned char)buf[s->pos++];
            if (c == (unsigned char)s->quote) {
                s->state = START;
                taken = take(s, buf, STRING_TOKEN, s->pos, record);
            } else if (c == '\\') {
                s->plain = false;
                s->state = STRING_ESCAPE;
            } else {
                stray(s, RF_JSON_STRAY, s->pos, record);
                taken = 1;
            }
            break;
        }
        case STRING_ESCAPE:
            s->pos++;
            if (c >= 0x20 && c < 0xFE) {
                s->plain = false;
                s->state = STRING;
            } else {
                stray(s, RF_JSON_STRAY, s->pos, record);
                taken = 1;
            }
            break;
        case START:
            if (c == ' ' || c == '\t' || c == '\r' || c == '\n') {
                if (s->inside && c < ' ' && c != '\t') {
                    s->shape |= RF_BROKEN;
                }
                s->pos++;
                continue;
            }
            s->token = s->pos++;
            open_value(s, s->token);
            switch (c) {
            case '{':
                taken = take(s, buf, LCURLY, s->pos, record);
                break;
            case '}':
                taken = take(s, buf, RCURLY, s->pos, record);
                break;
            case '[':
                taken = take(s, buf, LSQUARE, s->pos, record);
                break;
            case ']':
                taken = take(s, buf, RSQUARE, s->pos, record);
                break;
            case ':':
                taken = take(s, buf, COLON, s->pos, record);
                break;
            case ',':
                taken = take(s, buf, COMMA, s->pos, record);
                break;
            case '"':
            case '\'':
                s->quote = (char)c;
                s->plain = true;
                s->state = STRING;
                break;
            case '-':
                s->state = SIGN;
                break;
            case '0':
                s->state = ZERO;
                break;
            default:
                if (is_digit(c)) {
                    s->state = DIGITS;
                } else if (c >= 'a' && c <= 'z') {
                    s->state = KEYWORD;
                } else {
                    stray(s, RF_JSON_STRAY, s->pos, record);
                    taken = 1;
                }
            }
            break;
        default: {
            enum lexer_state next = in_word(s, c);
            if (next == RECOVERY) {
                s->pos++;
                stray(s, RF_JSON_STRAY, s->pos, record);
                taken = 1;
            } else if (next == START) { /* c belongs to the next token */
                enum token_type type = s->state == KEYWORD ? KEYWORD_TOKEN : NUMBER_TOKEN;
                s->state = START;
                taken = take(s, buf, type, s->pos, record);
            } else {
                s->state = next;
                s->pos++;
            }
        }
        }
        if (taken < 0) {
            return -1;
        }
        count += taken;
    }
    *keep = s->inside ? s->begin : s->pos;
    rebase(s, *keep);
    return count;
}

size_t rf_json_compact(const char *value, size_t len, char *out) {
    size_t n = 0;
    char quote = 0;

    for (size_t i = 0; i < len; i++) {
        char c = value[i];
        if (!quote) {
            if (c == ' ' || c == '\t' || c == '\r' || c == '\n') {
                continue;
            }
            if (c == '"' || c == '\'') {
                quote = c;
                c = '"';
            }
            out[n++] = c;
        } else if (c == quote) {
            quote = 0;
            out[n++] = '"';
        } else if (c == '"') {
            out[n++] = '\\';
            out[n++] = '"';
        } else if (c == '\\' && i + 1 < len) {
            c = value[++i];
            if (c != '\'') {
                out[n++] = '\\';
            }
            out[n++] = c;
        } else if (c == (char)0xC0 && i + 1 < len && value[i + 1] == (char)0x80) { /* U+0000 */
            memcpy(out + n, "\\u0000", 6);
            n += 6;
            i++;
        } else {
            out[n++] = c;
        }
    }
    return n;
}
