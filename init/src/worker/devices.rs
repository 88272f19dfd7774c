//! The device rules of a container, as a BPF program on its cgroup (linux.resources.devices of the runtime spec).
//!
//! The program is generated from the rules by a pure function. Each kind of access that is asked for (mknod, read, write) is decided by the
//! last rule that covers it; without one it is refused.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// A rule, with wildcards as none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Whether it permits what it covers.
    pub allow: bool,
    /// Block or character device; none is both.
    pub kind: Option<Kind>,
    /// Major number; none is all.
    pub major: Option<u32>,
    /// Minor number; none is all.
    pub minor: Option<u32>,
    /// [`MKNOD`], [`READ`], [`WRITE`].
    pub access: u32,
}

impl Rule {
    fn covers_all(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none()
    }

    /// Whether every device of the other rule is one of this rule's.
    fn covers(&self, other: &Rule) -> bool {
        (self.kind.is_none() || self.kind == other.kind)
            && (self.major.is_none() || self.major == other.major)
            && (self.minor.is_none() || self.minor == other.minor)
    }

    /// All but the accesses.
    fn decision(&self) -> (bool, Option<Kind>, Option<u32>, Option<u32>) {
        (self.allow, self.kind, self.major, self.minor)
    }
}

/// `BPF_DEVCG_DEV_*` of linux/bpf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A block device.
    Block = 1,
    /// A character device.
    Char = 2,
}

/// `BPF_DEVCG_ACC_*` of linux/bpf.h.
pub const MKNOD: u32 = 1;
/// See [`MKNOD`].
pub const READ: u32 = 2;
/// See [`MKNOD`].
pub const WRITE: u32 = 4;
/// Every access.
pub const ALL: u32 = MKNOD | READ | WRITE;

const fn char(major: u32, minor: Option<u32>) -> Rule {
    Rule { allow: true, kind: Some(Kind::Char), major: Some(major), minor, access: ALL }
}

/// What every container may do after its own rules, as runc has it: make any node, and use the devices that the spec promises
/// (config-linux.md, "Default Devices"). Numbers from the kernel's devices.txt.
pub const DEFAULT: [Rule; 11] = [
    Rule { allow: true, kind: Some(Kind::Char), major: None, minor: None, access: MKNOD },
    Rule { allow: true, kind: Some(Kind::Block), major: None, minor: None, access: MKNOD },
    char(1, Some(3)), // null
    char(1, Some(5)), // zero
    char(1, Some(7)), // full
    char(1, Some(8)), // random
    char(1, Some(9)), // urandom
    char(5, Some(0)), // tty
    char(5, Some(1)), // console
    char(5, Some(2)), // ptmx
    char(136, None),  // pts
];

/// `struct bpf_insn` of linux/bpf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Why the devices of a cgroup were not restricted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A jump over what the rules have become does not fit into an instruction, which has 16 bits for it, or, long before, they are more branches
    /// than the kernel's verifier follows.
    #[error("{0} rules are more than one program can decide on")]
    TooMany(usize),
    /// The kernel refused.
    #[error("bpf: {0}")]
    Kernel(#[from] io::Error),
}

/// Restricts the devices of a cgroup to what `rules` allow.
///
/// # Errors
/// As [`Error`] says.
pub fn restrict(group: &Path, rules: &[Rule]) -> Result<(), Error> {
    let Some(program) = program(rules).map_err(|TooFar| Error::TooMany(rules.len()))? else { return Ok(()) };
    let program = load(&program).map_err(|e| match e.raw_os_error() {
        Some(libc::E2BIG) => Error::TooMany(rules.len()),
        _ => Error::Kernel(e),
    })?;
    Ok(attach(group, &program)?)
}

/// A jump is longer than an instruction can say.
#[derive(Debug, PartialEq, Eq)]
struct TooFar;

/// A jump's distance: cut off to 16 bits it would lead somewhere else, even to where the access is allowed.
fn distance(instructions: usize) -> Result<i16, TooFar> {
    i16::try_from(instructions).map_err(|_| TooFar)
}

const TYPE: u8 = 3;
const ACCESS: u8 = 4;
const MAJOR: u8 = 5;
const MINOR: u8 = 6;

/// The program, or none when the rules allow everything. A context (`struct bpf_cgroup_dev_ctx`) comes in register 1.
fn program(rules: &[Rule]) -> Result<Option<Vec<Instruction>>, TooFar> {
    let decided: Vec<Vec<Rule>> = [MKNOD, READ, WRITE].iter().map(|&access| relevant(rules, access)).collect();
    if decided.iter().all(|rules| rules.iter().all(|rule| rule.allow) && rules.last().is_some_and(Rule::covers_all)) {
        return Ok(None);
    }
    let mut code = vec![
        // access_type holds the kind in its low half and the access in its high one.
        instruction(0x61, ACCESS | 1 << 4, 0, 0),
        instruction(0xbc, TYPE | ACCESS << 4, 0, 0),
        instruction(0x54, TYPE, 0, 0xffff),
        instruction(0x74, ACCESS, 0, 16),
        instruction(0x61, MAJOR | 1 << 4, 4, 0),
        instruction(0x61, MINOR | 1 << 4, 8, 0),
    ];
    let mut left: Vec<(u32, Vec<Rule>)> = [MKNOD, READ, WRITE].into_iter().zip(decided).collect();
    while let Some((mut access, rules)) = left.pop() {
        // Reading and writing are nearly always decided alike.
        left.retain(|(other, same)| {
            let alike = same.iter().map(Rule::decision).eq(rules.iter().map(Rule::decision));
            access |= if alike { *other } else { 0 };
            !alike
        });
        code.extend(decide(access, &rules)?);
    }
    code.extend([set_answer(1), exit()]);
    Ok(Some(code))
}

/// The rules that cover `access`, the last one first, up to the one that covers all devices: those before it decide nothing. Nor does a
/// rule after a wider one, or one behind which a wider one decides alike.
fn relevant(rules: &[Rule], access: u32) -> Vec<Rule> {
    let mut relevant: Vec<Rule> = Vec::new();
    for rule in rules.iter().rev().filter(|rule| rule.access & access != 0) {
        // Not only needless: nothing would reach it, which the verifier refuses.
        if relevant.iter().any(|wider| wider.covers(rule)) {
            continue;
        }
        let alike = relevant.iter().rposition(|before| before.allow != rule.allow).map_or(0, |other| other + 1);
        let mut at = 0;
        relevant.retain(|before| {
            at += 1;
            at <= alike || !rule.covers(before)
        });
        relevant.push(*rule);
        if rule.covers_all() {
            break;
        }
    }
    relevant
}

/// Instructions, and which of them are jumps to the place where the access is allowed.
#[derive(Default)]
struct Block {
    code: Vec<Instruction>,
    allowed: Vec<usize>,
}

impl Block {
    /// Appends a block that is passed over unless `register` holds `value`.
    fn push_if(&mut self, register: u8, value: Option<u32>, block: Block) -> Result<(), TooFar> {
        if let Some(value) = value {
            self.code.push(instruction(0x56, register, distance(block.code.len())?, value as i32));
        }
        self.allowed.extend(block.allowed.iter().map(|at| at + self.code.len()));
        self.code.extend(block.code);
        Ok(())
    }
}

/// Goes on after itself when none of `access` was asked for, or it is allowed; else ends the program with 0. Neighbours that share a
/// condition are tested for it once: the verifier's work, a good part of a create, is counted in branches.
fn decide(access: u32, rules: &[Rule]) -> Result<Vec<Instruction>, TooFar> {
    let mut all = Block::default();
    for same_kind in rules.chunk_by(|a, b| a.kind == b.kind) {
        let mut of_kind = Block::default();
        for same_major in same_kind.chunk_by(|a, b| a.major == b.major) {
            let mut of_major = Block::default();
            for rule in same_major {
                let action = if rule.allow {
                    Block { code: vec![jump(0)], allowed: vec![0] }
                } else {
                    Block { code: vec![set_answer(0), exit()], allowed: vec![] }
                };
                of_major.push_if(MINOR, rule.minor, action)?;
            }
            of_kind.push_if(MAJOR, same_major[0].major, of_major)?;
        }
        all.push_if(TYPE, same_kind[0].kind.map(|kind| kind as u32), of_kind)?;
    }
    if !rules.last().is_some_and(Rule::covers_all) {
        // The verifier refuses instructions that nothing reaches, so this stands only where rules may all have missed.
        all.code.extend([set_answer(0), exit()]);
    }
    let end = all.code.len();
    for at in all.allowed {
        all.code[at].offset = distance(end - at - 1)?;
    }
    // JSET: into the rules if one of the bits is set, over them if not.
    let mut whole = vec![instruction(0x46, ACCESS, 1, access as i32), jump(distance(end)?)];
    whole.extend(all.code);
    Ok(whole)
}

fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers, offset, immediate }
}

fn jump(offset: i16) -> Instruction {
    instruction(0x05, 0, offset, 0)
}

fn set_answer(value: i32) -> Instruction {
    instruction(0xb7, 0, 0, value)
}

fn exit() -> Instruction {
    instruction(0x95, 0, 0, 0)
}

/// `union bpf_attr` of linux/bpf.h for BPF_PROG_LOAD, as far as it is used.
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// `union bpf_attr` for BPF_PROG_ATTACH, as far as it is used.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the attributes, the instructions and the license outlive the call, and the sizes are theirs.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<LoadAttr>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: bpf(2) has just made this descriptor (close-on-exec, as all of its are), and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The attachment lives as long as the cgroup.
fn attach(group: &Path, program: &OwnedFd) -> io::Result<()> {
    let group = File::open(group)?;
    let attr = AttachAttr {
        target_fd: group.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attributes outlive the call, and the size is theirs.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<AttachAttr>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would; knows the instructions that it uses.
    fn run(program: &[Instruction], kind: Kind, access: u32, major: u32, minor: u32) -> bool {
        let mut registers = [0u64; 11];
        let context = [access << 16 | kind as u32, major, minor];
        let mut at = 0usize;
        loop {
            let Instruction { code, registers: both, offset, immediate } = program[at];
            let (to, from) = ((both & 15) as usize, (both >> 4) as usize);
            at += 1;
            let taken = match code {
                0x61 => {
                    registers[to] = context[offset as usize / 4] as u64;
                    false
                }
                0xbc => {
                    registers[to] = registers[from] as u32 as u64;
                    false
                }
                0x54 => {
                    registers[to] = (registers[to] as u32 & immediate as u32) as u64;
                    false
                }
                0x74 => {
                    registers[to] = (registers[to] as u32 >> immediate) as u64;
                    false
                }
                0xb7 => {
                    registers[to] = immediate as u64;
                    false
                }
                0x05 => true,
                0x46 => registers[to] as u32 & immediate as u32 != 0,
                0x56 => registers[to] as u32 != immediate as u32,
                0x95 => return registers[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            };
            if taken {
                at = at.checked_add_signed(offset as isize).unwrap();
            }
        }
    }

    /// The rules' meaning, told without a program.
    fn meaning(rules: &[Rule], kind: Kind, access: u32, major: u32, minor: u32) -> bool {
        [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            rules
                .iter()
                .rfind(|rule| {
                    rule.access & bit != 0
                        && rule.kind.is_none_or(|k| k == kind)
                        && rule.major.is_none_or(|m| m == major)
                        && rule.minor.is_none_or(|m| m == minor)
                })
                .is_some_and(|rule| rule.allow)
        })
    }

    const NOTHING: Rule = Rule { allow: false, kind: None, major: None, minor: None, access: ALL };
    const EVERYTHING: Rule = Rule { allow: true, ..NOTHING };

    /// As the kernel's check_cfg() sees it, before it looks at any value: -EINVAL for a program with instructions that nothing leads to.
    fn unreachable(program: &[Instruction]) -> Vec<usize> {
        let mut reached = vec![false; program.len()];
        let mut open = vec![0usize];
        while let Some(at) = open.pop() {
            if std::mem::replace(&mut reached[at], true) {
                continue;
            }
            let target = (at + 1).checked_add_signed(program[at].offset as isize).unwrap();
            match program[at].code {
                0x95 => {}
                0x05 => open.push(target),
                0x46 | 0x56 => open.extend([at + 1, target]),
                _ => open.push(at + 1),
            }
        }
        (0..program.len()).filter(|&at| !reached[at]).collect()
    }

    #[test]
    fn the_program_decides_what_the_rules_mean() {
        let read_disk = Rule { kind: Some(Kind::Block), major: Some(8), access: READ, ..EVERYTHING };
        let write_disk = Rule { access: WRITE, ..read_disk };
        let no_minor_1 = Rule { minor: Some(1), allow: false, access: READ, ..read_disk };
        let default = |own: &[Rule]| [own, &DEFAULT].concat();
        // What clients write: nothing, and then the usual devices one by one.
        let usual = [
            (1, Some(3)),
            (1, Some(8)),
            (1, Some(7)),
            (5, Some(0)),
            (1, Some(5)),
            (1, Some(9)),
            (5, Some(1)),
            (136, None),
            (5, Some(2)),
        ];
        let usual =
            usual.map(|(major, minor)| Rule { kind: Some(Kind::Char), major: Some(major), minor, ..EVERYTHING });
        let sets = [
            vec![],
            vec![NOTHING],
            vec![EVERYTHING, NOTHING],
            default(&[NOTHING]),
            default(&[NOTHING, read_disk, write_disk]),
            default(&[&[NOTHING][..], &usual].concat()),
            default(&[&[NOTHING][..], &usual, &[EVERYTHING, no_minor_1]].concat()),
            default(&[NOTHING, read_disk, no_minor_1]),
            default(&[EVERYTHING, no_minor_1]),
            vec![EVERYTHING, Rule { access: WRITE, ..NOTHING }],
            vec![NOTHING, Rule { major: Some(u32::MAX), ..EVERYTHING }],
        ];
        for rules in sets {
            let program = program(&rules).unwrap().unwrap();
            assert!(unreachable(&program).is_empty(), "{:?} of {rules:?}", unreachable(&program));
            for kind in [Kind::Block, Kind::Char] {
                for access in 1..=ALL {
                    for major in [0, 1, 5, 8, 10, 136, u32::MAX] {
                        for minor in [0, 1, 2, 3, 9, 200] {
                            assert_eq!(
                                run(&program, kind, access, major, minor),
                                meaning(&rules, kind, access, major, minor),
                                "{rules:?}: {kind:?} {major}:{minor} {access}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_container_has_its_default_devices_and_no_others() {
        let rules = [&[NOTHING][..], &DEFAULT].concat();
        let program = program(&rules).unwrap().unwrap();
        assert!(run(&program, Kind::Char, READ | WRITE, 1, 3), "null");
        assert!(run(&program, Kind::Char, READ | WRITE, 136, 7), "a pty");
        assert!(run(&program, Kind::Block, MKNOD, 8, 0), "make a node");
        assert!(!run(&program, Kind::Block, READ, 8, 0), "read a disk");
        assert!(!run(&program, Kind::Char, WRITE, 1, 1), "write /dev/mem");
    }

    #[test]
    fn a_containers_program_has_few_branches() {
        let program = program(&[&[NOTHING][..], &DEFAULT].concat()).unwrap().unwrap();
        let branches = program.iter().filter(|one| matches!(one.code, 0x46 | 0x56)).count();
        // Two accesses, two kinds for mknod, and for reading and writing one kind, three majors and eight minors.
        assert_eq!(branches, 2 + 2 + 1 + 3 + 8);
    }

    #[test]
    fn a_container_that_may_do_everything_needs_no_program() {
        assert_eq!(program(&[EVERYTHING]), Ok(None));
        assert_eq!(program(&[&[NOTHING, EVERYTHING][..], &DEFAULT].concat()), Ok(None));
        assert!(program(&[EVERYTHING, NOTHING]).unwrap().is_some());
    }

    #[test]
    fn rules_whose_jumps_would_be_too_long_are_refused() {
        // Three instructions each, two conditions and a jump to the end, and three for all.
        let rules = |count| (0..count).map(|major| char(major, Some(1))).collect::<Vec<_>>();
        let most = decide(ALL, &rules(10_921)).unwrap();
        assert!(most.iter().all(|one| one.offset >= 0), "all jumps lead forward");
        assert_eq!(decide(ALL, &rules(10_922)), Err(TooFar));
    }
}
