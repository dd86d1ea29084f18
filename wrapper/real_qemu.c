#include "real_qemu.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#ifndef REFAULT_QEMU_DIRS
#define REFAULT_QEMU_DIRS "/usr/local/bin", "/usr/bin", "/usr/libexec"
#endif
#ifndef REFAULT_QEMU_KVM
#define REFAULT_QEMU_KVM "/usr/libexec/qemu-kvm"
#endif

static const char PREFIX[] = "refault-";
static const char SYSTEM[] = "qemu-system-";
static const char *const DIRECTORIES[] = {REFAULT_QEMU_DIRS};

/* Whether the program at path can be run, and is not this one by another name. */
static int is_another(const char *path) {
    struct stat self, there;
    if (stat(path, &there) != 0 || !S_ISREG(there.st_mode) || access(path, X_OK) != 0)
        return 0;
    if (stat("/proc/self/exe", &self) != 0)
        return 0; /* without /proc nothing shows that it is not */
    return self.st_dev != there.st_dev || self.st_ino != there.st_ino;
}

static int is_for_this_machine(const char *name) {
    struct utsname machine;
    return strcmp(name, "qemu-kvm") == 0 ||
           (strncmp(name, SYSTEM, strlen(SYSTEM)) == 0 && uname(&machine) == 0 &&
            strcmp(name + strlen(SYSTEM), machine.machine) == 0);
}

int refault_real_qemu(const char *called, char *path, size_t size) {
    const char *slash = strrchr(called, '/');
    const char *name = slash != NULL ? slash + 1 : called;
    if (strncmp(name, PREFIX, strlen(PREFIX)) != 0 || name[strlen(PREFIX)] == '\0')
        return 0;
    name += strlen(PREFIX);
    for (size_t i = 0; i < sizeof(DIRECTORIES) / sizeof(DIRECTORIES[0]); i++) {
        const int length = snprintf(path, size, "%s/%s", DIRECTORIES[i], name);
        if (length > 0 && (size_t)length < size && is_another(path))
            return 1;
    }
    if (!is_for_this_machine(name) || strlen(REFAULT_QEMU_KVM) >= size)
        return 0;
    strcpy(path, REFAULT_QEMU_KVM);
    return is_another(path);
}
