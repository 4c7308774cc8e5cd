/* Preloaded into QEMU: has the kernel note which pages of the guest's RAM are written.
 *
 * When QEMU maps the file that STRATABOX_RAM names ("DEVICE:INODE", decimal), that mapping is
 * registered with userfaultfd in asynchronous write-protect mode: the daemon then protects and
 * reads pages from outside, by PAGEMAP_SCAN on /proc/PID/pagemap, and a write to a protected page
 * is noted by the kernel alone. Nobody ever reads the userfaultfd, but it must stay open, because
 * closing it ends the registration. Where anything is missing QEMU runs as if this was not here.
 *
 * With STRATABOX_PTRACER set, QEMU also lets any process of its own uid read its memory, where the
 * kernel (Yama's ptrace_scope=1) would let only its parent: the daemon that started it may have
 * been followed by another one. Set only where daemon and QEMU have the same uid and are not root.
 *
 * Only QEMU's own calls of mmap come through here, not those inside libc. Needs Linux 6.7; the
 * constants are spelled out because headers may be older (include/uapi/linux/userfaultfd.h).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define API 0xAAULL
#define USER_MODE_ONLY 1 /* what a process without privileges may have; enough, for in asynchronous
                            mode no fault is ever handed to user space, the kernel's own neither */
#define FEATURE_WP_UNPOPULATED (1ULL << 13)
#define FEATURE_WP_ASYNC (1ULL << 15)
#define MODE_WP 2ULL

struct api {
	uint64_t api, features, ioctls;
};
struct registration {
	uint64_t start, length, mode, ioctls;
};
#define UFFDIO_API _IOWR(0xAA, 0x3F, struct api)
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct registration)

static unsigned long long device, inode;
static int wanted;

__attribute__((constructor)) static void begin(void)
{
	const char *name = getenv("STRATABOX_RAM");

	if (getenv("STRATABOX_PTRACER"))
		prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0); /* no Yama: EINVAL, and no need */
	unsetenv("STRATABOX_PTRACER");
	wanted = name && sscanf(name, "%llu:%llu", &device, &inode) == 2;
	unsetenv("STRATABOX_RAM");
	unsetenv("LD_PRELOAD");
}

static void track(void *start, size_t length, int fd)
{
	struct api api = {API, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED, 0};
	struct registration registration = {(uintptr_t)start, length, MODE_WP, 0};
	struct stat status;
	int uffd;

	if (fstat(fd, &status) || status.st_dev != device || status.st_ino != inode)
		return;
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | USER_MODE_ONLY);
	if (uffd < 0)
		return;
	if (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &registration))
		close(uffd);
}

static void *map(void *start, size_t length, int protection, int flags, int fd, off_t offset)
{
	void *result = (void *)syscall(SYS_mmap, start, length, protection, flags, fd, offset);
	int error = errno;

	if (wanted && fd >= 0 && result != MAP_FAILED && (flags & MAP_PRIVATE) &&
	    (protection & PROT_WRITE))
		track(result, length, fd);
	errno = error;
	return result;
}

/* QEMU is built with 64-bit offsets and calls mmap64; on 64-bit machines both are the same. */
__attribute__((visibility("default"))) void *mmap(void *start, size_t length, int protection,
						  int flags, int fd, off_t offset)
{
	return map(start, length, protection, flags, fd, offset);
}

__attribute__((visibility("default"))) void *mmap64(void *start, size_t length, int protection,
						    int flags, int fd, off64_t offset)
{
	return map(start, length, protection, flags, fd, offset);
}
