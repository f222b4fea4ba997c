/* A quota of QUOTA_BYTES on all that is written below QUOTA_FOLDER, played by a library that is loaded before libc
   (LD_PRELOAD): the write that passes it is cut, the next one fails with EDQUOT. What is deleted comes back. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <ftw.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static __thread long long taken;

static int add(const char *path, const struct stat *is, int kind, struct FTW *at) {
    (void)path, (void)at;
    taken += kind == FTW_F ? is->st_size : 0;
    return 0;
}

/* Bytes that file may still grow by, or -1 for one that has no quota. */
static long long room(int file) {
    char link[64], path[PATH_MAX];
    const char *folder = getenv("QUOTA_FOLDER");
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!folder || length < 0) return -1;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return -1;
    taken = 0;
    nftw(folder, add, 16, FTW_PHYS);
    long long left = atoll(getenv("QUOTA_BYTES")) - taken;
    return left > 0 ? left : 0;
}

static size_t allowed(int file, size_t count) {
    long long left = room(file);
    return left < 0 || (unsigned long long)left > count ? count : (size_t)left;
}

ssize_t write(int file, const void *bytes, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    size_t some = allowed(file, count);
    if (count && !some) return errno = EDQUOT, -1;
    return real(file, bytes, some);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    for (int i = 0; i < count; i++)
        if (parts[i].iov_len) return write(file, parts[i].iov_base, parts[i].iov_len); /* short, as it may be */
    return 0;
}
