// Errors inside the library: thrown, and turned into a code where C calls.
#pragma once
#include <stdarg.h>
#include <stdio.h>

#include "ferro.h"

namespace ferro_c {

struct Error {
    int status;
    char text[FERRO_MESSAGE_BYTES];
};

__attribute__((format(printf, 2, 3), noreturn)) inline void fail(int status, const char *format,
                                                                 ...) {
    Error error;
    error.status = status;
    va_list values;
    va_start(values, format);
    vsnprintf(error.text, sizeof error.text, format, values);
    va_end(values);
    throw error;
}

} // namespace ferro_c
