# The lab's guest: 512 bytes of firmware whose vCPUs write to random pages of their memory for ever, so that what each
# page must hold follows from two numbers a vCPU (see guest.py, which computes it).
#
#     as --32 -o guest.o guest.S && ld -m elf_i386 --oformat binary -Ttext 0xffe00 -o guest.bin guest.o
#
# These are the last 512 bytes below 1 MiB, in the place of a BIOS: the guest writes from its first millisecond, and
# nothing else has touched its memory. Only plain integer instructions, and no iret: some hosts' KVM emulates each.
#
# Low memory:  0x8000 where the other vCPUs start   0x10000 + 0x1000 * vCPU: that vCPU's state page
# State page:  +0 u32 sweep, u32 rank (the next step), in one store   +8 u32 vCPU + 1   top: its stack
# Arena:       2^m pages for each vCPU, one after the other, from 16 MiB upwards
#
# A sweep (numbered from 1) visits each page of the arena once, in the order given by a bijection of the rank. A visit
# is one 8-byte store into slot (sweep mod 512) of the page: u32 sweep, u32 page address + vCPU + 1.

        .set    SEGMENT, 0xf0000             # in real mode the code is at SEGMENT:START
        .set    START, 0xfe00
        .set    APIC, 0xfee00000
        .set    STATE, 0x10000
        .set    ARENA, 0x1000000
        .set    TRAMPOLINE, 0x8000
        .set    VECTOR, 0x20

        .text
        .globl  _start
        .code16
_start: cli                             # the first vCPU comes from reset, the others from TRAMPOLINE
        lgdtl   %cs:(gdt_pointer - _start + START)
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $8, $flat

        .code32
flat:   movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    APIC + 0x20, %ebp       # the local APIC's id is the vCPU's number
        shrl    $24, %ebp
        movl    %ebp, %edi
        shll    $12, %ebp
        addl    $STATE, %ebp
        leal    0x1000(%ebp), %esp
        leal    1(%edi), %eax
        movl    %eax, 8(%ebp)
        testl   %edi, %edi
        jnz     work

        movb    $0xff, %al              # no interrupts but the local timer's
        outb    %al, $0x21
        outb    %al, $0xa1
        movl    $0x00fe00ea, TRAMPOLINE # ljmp $0xf000, $0xfe00
        movb    $0xf0, TRAMPOLINE + 4
        movl    $0x000c4500, %eax       # INIT to all others, then SIPI twice
        call    send
        movl    $0x000c4600 + (TRAMPOLINE >> 12), %eax
        call    send
        call    send

work:   movb    log_pages, %cl          # %edi: base of this vCPU's arena
        shll    $12, %edi
        shll    %cl, %edi
        addl    $ARENA, %edi
        incb    %cl                     # %cl: half the rank's bits, rounded up
        shrb    $1, %cl
        movl    tick, %eax
        testl   %eax, %eax
        jz      1f
        lidtl   idt_pointer
        movl    $0x100 + VECTOR, APIC + 0xf0
        movl    $0x20000 + VECTOR, APIC + 0x320         # periodic
        movl    $0xb, APIC + 0x3e0                      # undivided: 1 ns a tick on KVM and on TCG
        movl    %eax, APIC + 0x380
1:      movl    $1, %ebx                # %ebx: sweep, %esi: rank
        xorl    %esi, %esi

step:   imull   $0x9e3779b1, %esi, %eax # rank to page: odd factor, fold, odd factor; each is a bijection mod 2^m
        andl    mask, %eax
        movl    %eax, %edx
        shrl    %cl, %edx
        xorl    %edx, %eax
        imull   $0x85ebca6b, %eax, %eax
        andl    mask, %eax
        shll    $12, %eax
        addl    %edi, %eax
        pushl   %ecx
        pushl   %edi
        movl    8(%ebp), %ecx
        addl    %eax, %ecx
        movl    %ebx, %edi
        andl    $511, %edi
        leal    (%eax,%edi,8), %edi
        call    store                   # the visit
        incl    %esi
        andl    mask, %esi
        jnz     2f
        incl    %ebx
2:      movl    %esi, %ecx
        movl    %ebp, %edi
        call    store                   # and what is next
        popl    %edi
        popl    %ecx
        cmpl    $0, tick
        je      step
        cmpl    $1, %ebx                # the first sweep fills the arena, as fast as it goes
        je      step
        sti
        hlt                             # until the timer, which goes to step
        jmp     step

timer:  movl    $0, APIC + 0xb0         # end of interrupt; it came out of hlt, so where to go on is known
        addl    $12, %esp
        jmp     step

store:  movl    (%edi), %eax            # %ebx and %ecx to 8 bytes at %edi at once: a stop never falls in between
        movl    4(%edi), %edx
        cmpxchg8b (%edi)
        jne     store
        ret

send:   movl    %eax, APIC + 0x300      # a command to the other vCPUs, and some time for it
        movl    $100, %ecx
3:      outb    %al, $0x80
        loop    3b
        ret

        .balign 8
gate:   .word   timer - _start + START, 8     # the one entry of the interrupt table that is ever used
        .byte   0, 0x8e
        .word   SEGMENT >> 16
idt_pointer:
        .word   VECTOR * 8 + 7
        .long   gate - VECTOR * 8
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff       # marked accessed: they are in ROM
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

        .org    0x1e0                   # the parameters, set by guest.py
tick:   .long   0                       # nanoseconds between two steps after the first sweep; 0: none
mask:   .long   0xfff                   # 2^m - 1
log_pages:
        .byte   12                      # m

        .org    0x1f0                   # where a reset vCPU starts
        .code16
        ljmpw   $SEGMENT >> 4, $START
        .org    0x200
