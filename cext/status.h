/*
 * Status codes of the channel core. Functions that can refuse return one of these as a negative int; nothing
 * in the core aborts, and nothing logs: the caller knows whom to tell.
 */
#ifndef RF_STATUS_H
#define RF_STATUS_H

/* cffi: begin */
enum rf_status {
    RF_OK = 0,
    RF_NO_MEMORY = -1,     /* the allocator or the ceiling said no */
    RF_OUT_OF_RANGE = -2,  /* beyond the end of the map or of the RAM block */
    RF_UNKNOWN_BLOCK = -3, /* no RAM block of that name or index */
    RF_MISALIGNED = -4,    /* not whole pages of the block */
    RF_FULL = -5,          /* a table has reached its ceiling */
    RF_BAD_SIZE = -6,      /* a size that contradicts what was declared */
    RF_BAD_NAME = -7,      /* empty, or longer than 255 bytes */
};

const char *rf_status_text(int status);
/* cffi: end */

#endif
