"""A filter of system calls. It denies those that no test program needs and that reach far."""

from __future__ import annotations

import ctypes
import errno
import platform
import socket
import struct

# by name: number on x86-64, number on arm64
DENIED = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # parts of the kernel with a large surface
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "syslog": (103, 116),
    "personality": (135, 92),
    # memory and messages that outlive a process, or that no limit counts
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "io_setup": (206, 0),  # of a number that all processes of the machine share
}
# the same for calls whose arguments decide
CLONE, CLONE3, MMAP, SET_OPTION = (56, 220), (435, 435), (9, 222), (54, 208)
SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}
KILL = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
NAMESPACES = 0x7E020000
SHARED_WITHOUT_FILE = 0x21
"""Flags of memory that need not count as that of any process."""
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER_MODE = 38, 22, 2


def supported() -> bool:
    """Return whether the numbers of this machine's system calls are known."""
    return platform.machine() in ARCHITECTURES and struct.calcsize("P") == 8


def program(only_signal: int | None = None) -> bytes:
    """Return the filter as a program of the Berkeley Packet Filter.

    Args:
        only_signal: the one process that may get signals; None: all that are visible.
    """
    column, architecture = ARCHITECTURES[platform.machine()]
    no = ERRNO | errno.EPERM

    def code(operation: int, value: int, yes: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("=HBBI", operation, yes, otherwise, value)

    def checked(number: int, test: bytes, verdict: int, argument: int = 0) -> bytes:
        # `test` skips the next instruction, the verdict, unless the call is denied
        steps = code(LOAD, FIRST_ARGUMENT + 8 * argument) + test
        steps += code(RETURN, verdict) + code(RETURN, ALLOW)
        return code(EQUAL, number, 0, len(steps) // 8) + steps

    parts = [
        code(LOAD, ARCHITECTURE),
        code(EQUAL, architecture, 1, 0),
        code(RETURN, KILL_PROCESS),
        code(LOAD, NUMBER),
        code(AT_LEAST, 0x40000000, 0, 1),  # the x32 calls of x86-64
        code(RETURN, no),
    ]
    for numbers in DENIED.values():
        parts += [code(EQUAL, numbers[column], 0, 1), code(RETURN, no)]
    parts += [code(EQUAL, CLONE3[column], 0, 1), code(RETURN, ERRNO | errno.ENOSYS)]
    parts.append(checked(CLONE[column], code(ANY_BIT, NAMESPACES, 0, 1), no))
    is_local = code(EQUAL, socket.AF_UNIX, 1, 0)
    for numbers in SOCKETS.values():
        parts.append(checked(numbers[column], is_local, ERRNO | errno.EAFNOSUPPORT))
    # memory that no limit counts
    keeps_buffers = code(EQUAL, socket.SO_SNDBUF, 0, 1)
    parts.append(checked(SET_OPTION[column], keeps_buffers, no, 2))
    has_owner = code(AND, SHARED_WITHOUT_FILE) + code(EQUAL, SHARED_WITHOUT_FILE, 0, 1)
    parts.append(checked(MMAP[column], has_owner, no, 3))
    for numbers in KILL.values() if only_signal is not None else ():
        parts.append(checked(numbers[column], code(EQUAL, only_signal or 0, 1, 0), no))
    return b"".join([*parts, code(RETURN, ALLOW)])


def install(only_signal: int | None = None) -> None:
    """Filter the calls of this process and its children, for good.

    Args:
        only_signal: the one process that may get signals; None: all that are visible.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = program(only_signal)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    for call in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SET_SECCOMP, FILTER_MODE, header, 0, 0)):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "seccomp")
