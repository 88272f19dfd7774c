//! The device rules of a container, as a BPF program on its cgroup (linux.resources.devices of the runtime spec).
//!
//! A pure function generates the program from the rules. For each requested kind of access (mknod, read, write), the
//! last rule that covers it decides. Access that no rule covers is denied.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// A rule. `None` is a wildcard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeviceRule {
    pub(super) allow: bool,
    pub(super) device_type: Option<DeviceType>,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    /// Bits of [`MKNOD`], [`READ`] and [`WRITE`].
    pub(super) access: u32,
}

impl DeviceRule {
    fn covers_all(&self) -> bool {
        self.device_type.is_none() && self.major.is_none() && self.minor.is_none()
    }

    /// Whether this rule covers every device of the other one.
    fn covers(&self, other: &DeviceRule) -> bool {
        (self.device_type.is_none() || self.device_type == other.device_type)
            && (self.major.is_none() || self.major == other.major)
            && (self.minor.is_none() || self.minor == other.minor)
    }

    /// The rule without its kinds of access.
    fn decision(&self) -> (bool, Option<DeviceType>, Option<u32>, Option<u32>) {
        (self.allow, self.device_type, self.major, self.minor)
    }
}

/// `BPF_DEVCG_DEV_*` of linux/bpf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum DeviceType {
    Block = 1,
    Char = 2,
}

/// `BPF_DEVCG_ACC_*` of linux/bpf.h.
pub(super) const MKNOD: u32 = 1;
/// See [`MKNOD`].
pub(super) const READ: u32 = 2;
/// See [`MKNOD`].
pub(super) const WRITE: u32 = 4;
pub(super) const ALL: u32 = MKNOD | READ | WRITE;

const fn char(major: u32, minor: Option<u32>) -> DeviceRule {
    DeviceRule { allow: true, device_type: Some(DeviceType::Char), major: Some(major), minor, access: ALL }
}

/// The rules that, like in runc, follow the container's own: create any node, and use the devices that the spec
/// requires (config-linux.md, "Default Devices"). The numbers are from the kernel's devices.txt.
pub(super) const DEFAULT: [DeviceRule; 11] = [
    DeviceRule { allow: true, device_type: Some(DeviceType::Char), major: None, minor: None, access: MKNOD },
    DeviceRule { allow: true, device_type: Some(DeviceType::Block), major: None, minor: None, access: MKNOD },
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
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceRulesError {
    /// A jump over the generated instructions does not fit into the 16 bits of its field. The kernel's verifier rejects
    /// smaller programs too, if they have too many branches.
    #[error("{0} rules are more than one program can contain")]
    TooMany(usize),
    #[error("bpf")]
    Bpf(#[from] io::Error),
}

/// Restricts the devices of a cgroup to those that `rules` allow.
pub(super) fn restrict(cgroup: &Path, rules: &[DeviceRule]) -> Result<(), DeviceRulesError> {
    let program = program(rules).map_err(|JumpTooFar| DeviceRulesError::TooMany(rules.len()))?;
    let Some(program) = program else { return Ok(()) };
    let program = load(&program).map_err(|e| match e.raw_os_error() {
        Some(libc::E2BIG) => DeviceRulesError::TooMany(rules.len()),
        _ => DeviceRulesError::Bpf(e),
    })?;
    Ok(attach(cgroup, &program)?)
}

/// The distance of a jump does not fit into an instruction.
#[derive(Debug, PartialEq, Eq)]
struct JumpTooFar;

/// Checks the distance of a jump. Truncated to 16 bits, it could lead to an instruction that allows the access.
fn distance(instructions: usize) -> Result<i16, JumpTooFar> {
    i16::try_from(instructions).map_err(|_| JumpTooFar)
}

const TYPE: u8 = 3;
const ACCESS: u8 = 4;
const MAJOR: u8 = 5;
const MINOR: u8 = 6;

/// Generates the program, or `None` if the rules allow everything. Register 1 points to the context (`struct
/// bpf_cgroup_dev_ctx`).
fn program(rules: &[DeviceRule]) -> Result<Option<Vec<Instruction>>, JumpTooFar> {
    let decided: Vec<Vec<DeviceRule>> = [MKNOD, READ, WRITE].iter().map(|&access| relevant(rules, access)).collect();
    if decided
        .iter()
        .all(|rules| rules.iter().all(|rule| rule.allow) && rules.last().is_some_and(DeviceRule::covers_all))
    {
        return Ok(None);
    }
    let mut code = vec![
        // access_type contains the device type in its low half and the access in its high half.
        instruction(0x61, ACCESS | 1 << 4, 0, 0),
        instruction(0xbc, TYPE | ACCESS << 4, 0, 0),
        instruction(0x54, TYPE, 0, 0xffff),
        instruction(0x74, ACCESS, 0, 16),
        instruction(0x61, MAJOR | 1 << 4, 4, 0),
        instruction(0x61, MINOR | 1 << 4, 8, 0),
    ];
    let mut remaining: Vec<(u32, Vec<DeviceRule>)> = [MKNOD, READ, WRITE].into_iter().zip(decided).collect();
    while let Some((mut access, rules)) = remaining.pop() {
        // The same rules nearly always apply to reading and writing.
        remaining.retain(|(other, same)| {
            let alike = same.iter().map(DeviceRule::decision).eq(rules.iter().map(DeviceRule::decision));
            access |= if alike { *other } else { 0 };
            !alike
        });
        code.extend(decide(access, &rules)?);
    }
    code.extend([set_result(1), exit()]);
    Ok(Some(code))
}

/// The rules that decide on `access`, last rule first. Omits rules that have no effect: those before a rule for all
/// devices, those that a wider rule overrides, and those that a wider rule with the same decision makes redundant.
fn relevant(rules: &[DeviceRule], access: u32) -> Vec<DeviceRule> {
    let mut relevant: Vec<DeviceRule> = Vec::new();
    for rule in rules.iter().rev().filter(|rule| rule.access & access != 0) {
        // The verifier rejects unreachable instructions.
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

#[derive(Default)]
struct CodeBlock {
    code: Vec<Instruction>,
    /// Indices of the jumps that lead to the code for an allowed access.
    allowed: Vec<usize>,
}

impl CodeBlock {
    /// Appends a block that is skipped unless `register` contains `value`.
    fn push_if(&mut self, register: u8, value: Option<u32>, block: CodeBlock) -> Result<(), JumpTooFar> {
        if let Some(value) = value {
            self.code.push(instruction(0x56, register, distance(block.code.len())?, value as i32));
        }
        self.allowed.extend(block.allowed.iter().map(|at| at + self.code.len()));
        self.code.extend(block.code);
        Ok(())
    }
}

/// Generates the code for `access`. It continues at its end if no such access was requested or if it is allowed, and
/// otherwise ends the program with 0. Adjacent rules share the test of a common condition: the verifier's work, a good
/// part of a create, grows with the number of branches.
fn decide(access: u32, rules: &[DeviceRule]) -> Result<Vec<Instruction>, JumpTooFar> {
    let mut all = CodeBlock::default();
    for same_type in rules.chunk_by(|a, b| a.device_type == b.device_type) {
        let mut of_type = CodeBlock::default();
        for same_major in same_type.chunk_by(|a, b| a.major == b.major) {
            let mut of_major = CodeBlock::default();
            for rule in same_major {
                let action = if rule.allow {
                    CodeBlock { code: vec![jump(0)], allowed: vec![0] }
                } else {
                    CodeBlock { code: vec![set_result(0), exit()], allowed: vec![] }
                };
                of_major.push_if(MINOR, rule.minor, action)?;
            }
            of_type.push_if(MAJOR, same_major[0].major, of_major)?;
        }
        all.push_if(TYPE, same_type[0].device_type.map(|device_type| device_type as u32), of_type)?;
    }
    if !rules.last().is_some_and(DeviceRule::covers_all) {
        // Only if it is possible that no rule matches: the verifier rejects unreachable instructions.
        all.code.extend([set_result(0), exit()]);
    }
    let end = all.code.len();
    for at in all.allowed {
        all.code[at].offset = distance(end - at - 1)?;
    }
    // JSET: if one of the bits is set, enters the rules; if not, skips them.
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

fn set_result(value: i32) -> Instruction {
    instruction(0xb7, 0, 0, value)
}

fn exit() -> Instruction {
    instruction(0x95, 0, 0, 0)
}

/// `union bpf_attr` of linux/bpf.h for BPF_PROG_LOAD, up to the last field that is used.
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

/// `union bpf_attr` for BPF_PROG_ATTACH, up to the last field that is used.
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
    // SAFETY: the attributes, the instructions and the license outlive the call, and the sizes match them.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<LoadAttr>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: bpf(2) has just created this descriptor (close-on-exec, like all of its), and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Attaches a program for the lifetime of the cgroup.
fn attach(cgroup: &Path, program: &OwnedFd) -> io::Result<()> {
    let cgroup = File::open(cgroup)?;
    let attr = AttachAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attributes outlive the call, and the size matches them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<AttachAttr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets the instructions that the program uses.
    fn run(program: &[Instruction], device_type: DeviceType, access: u32, major: u32, minor: u32) -> bool {
        let mut registers = [0u64; 11];
        let context = [access << 16 | device_type as u32, major, minor];
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

    /// Evaluates the rules directly, without a program.
    fn evaluate(rules: &[DeviceRule], device_type: DeviceType, access: u32, major: u32, minor: u32) -> bool {
        [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            rules
                .iter()
                .rfind(|rule| {
                    rule.access & bit != 0
                        && rule.device_type.is_none_or(|own| own == device_type)
                        && rule.major.is_none_or(|m| m == major)
                        && rule.minor.is_none_or(|m| m == minor)
                })
                .is_some_and(|rule| rule.allow)
        })
    }

    const NOTHING: DeviceRule = DeviceRule { allow: false, device_type: None, major: None, minor: None, access: ALL };
    const EVERYTHING: DeviceRule = DeviceRule { allow: true, ..NOTHING };

    /// Finds unreachable instructions like the kernel's check_cfg(), which fails with EINVAL for them and does not
    /// consider values.
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
    fn the_program_and_the_rules_decide_alike() {
        let read_disk = DeviceRule { device_type: Some(DeviceType::Block), major: Some(8), access: READ, ..EVERYTHING };
        let write_disk = DeviceRule { access: WRITE, ..read_disk };
        let no_minor_1 = DeviceRule { minor: Some(1), allow: false, access: READ, ..read_disk };
        let default = |own: &[DeviceRule]| [own, &DEFAULT].concat();
        // Clients send a rule that denies everything, followed by one rule for each usual device.
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
        let usual = usual.map(|(major, minor)| DeviceRule {
            device_type: Some(DeviceType::Char),
            major: Some(major),
            minor,
            ..EVERYTHING
        });
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
            vec![EVERYTHING, DeviceRule { access: WRITE, ..NOTHING }],
            vec![NOTHING, DeviceRule { major: Some(u32::MAX), ..EVERYTHING }],
        ];
        for rules in sets {
            let program = program(&rules).unwrap().unwrap();
            assert!(unreachable(&program).is_empty(), "{:?} of {rules:?}", unreachable(&program));
            for device_type in [DeviceType::Block, DeviceType::Char] {
                for access in 1..=ALL {
                    for major in [0, 1, 5, 8, 10, 136, u32::MAX] {
                        for minor in [0, 1, 2, 3, 9, 200] {
                            assert_eq!(
                                run(&program, device_type, access, major, minor),
                                evaluate(&rules, device_type, access, major, minor),
                                "{rules:?}: {device_type:?} {major}:{minor} {access}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_container_has_only_the_default_devices() {
        let rules = [&[NOTHING][..], &DEFAULT].concat();
        let program = program(&rules).unwrap().unwrap();
        assert!(run(&program, DeviceType::Char, READ | WRITE, 1, 3), "null");
        assert!(run(&program, DeviceType::Char, READ | WRITE, 136, 7), "a pty");
        assert!(run(&program, DeviceType::Block, MKNOD, 8, 0), "make a node");
        assert!(!run(&program, DeviceType::Block, READ, 8, 0), "read a disk");
        assert!(!run(&program, DeviceType::Char, WRITE, 1, 1), "write /dev/mem");
    }

    #[test]
    fn the_program_of_a_typical_container_has_few_branches() {
        let program = program(&[&[NOTHING][..], &DEFAULT].concat()).unwrap().unwrap();
        let branches = program.iter().filter(|one| matches!(one.code, 0x46 | 0x56)).count();
        // Two kinds of access; two device types for mknod; one device type, three majors and eight minors for reading
        // and writing.
        assert_eq!(branches, 2 + 2 + 1 + 3 + 8);
    }

    #[test]
    fn rules_that_allow_everything_need_no_program() {
        assert_eq!(program(&[EVERYTHING]), Ok(None));
        assert_eq!(program(&[&[NOTHING, EVERYTHING][..], &DEFAULT].concat()), Ok(None));
        assert!(program(&[EVERYTHING, NOTHING]).unwrap().is_some());
    }

    #[test]
    fn too_many_rules_for_the_jump_distance_are_rejected() {
        // Three instructions for each rule (two conditions and a jump to the end), and three for all.
        let rules = |count| (0..count).map(|major| char(major, Some(1))).collect::<Vec<_>>();
        let longest = decide(ALL, &rules(10_921)).unwrap();
        assert!(longest.iter().all(|one| one.offset >= 0), "a jump leads backward");
        assert_eq!(decide(ALL, &rules(10_922)), Err(JumpTooFar));
    }
}
