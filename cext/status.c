#include "status.h"

const char *rf_status_text(int status) {
    switch (status) {
    case RF_OK:
        return "success";
    case RF_NO_MEMORY:
        return "no memory left under the ceiling";
    case RF_OUT_OF_RANGE:
        return "beyond the end";
    case RF_UNKNOWN_BLOCK:
        return "unknown RAM block";
    case RF_MISALIGNED:
        return "not aligned to the RAM block's pages";
    case RF_FULL:
        return "table full";
    case RF_BAD_SIZE:
        return "size contradicts what was declared";
    case RF_BAD_NAME:
        return "bad name";
    default:
        return "unknown status";
    }
}
