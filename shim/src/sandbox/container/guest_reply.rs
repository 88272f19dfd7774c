//! Validates the guest's replies to calls that the shim relays. Pure.
//!
//! Replies are rebuilt: containerd receives the values that the guest has to supply, in their ranges, and no fields that
//! only the guest knows.

use std::sync::Arc;

use containerd_shim_protos::api::{DeleteResponse, PidsResponse, ProcessInfo, StateResponse, StatsResponse, Status};
use husk_protos::runc_options::ProcessDetails;
use husk_protos::{METRICS, PROCESS_DETAILS};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, Message, MessageField};

use super::guest_event::{valid_status, valid_time};
use super::process::{Exit, Process};

/// Most processes in a list. A host has at most four million PIDs, but no container of a VM has as many processes.
pub(crate) const PROCESSES_MAX: usize = 65_536;
/// Largest statistics of a container, bytes. Those of an honest guest have some hundred bytes per device.
pub(crate) const STATS_MAX: usize = 64 * 1024;

/// A reply that the guest must not send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidReply {
    #[error("the guest lists {0} processes, more than {PROCESSES_MAX}")]
    Processes(usize),
    #[error("the guest sends statistics of {0} bytes, more than {STATS_MAX}")]
    Stats(usize),
    #[error("encode the details of a process")]
    Encode,
}

/// How and when a process ended, as the guest claims. Without a possible time, `now`.
pub(crate) fn exit(status: u32, at: Option<&Timestamp>, now: &Timestamp) -> Exit {
    Exit { status: valid_status(status), at: valid_time(at, now).unwrap_or_else(|| now.clone()) }
}

/// A process's state. The shim's own record of the exit counts, if there is one.
pub(crate) fn state(claimed: &StateResponse, recorded: Option<Exit>, now: &Timestamp) -> StateResponse {
    let known = match recorded {
        Some(_) => Status::STOPPED,
        None => claimed.status.enum_value().unwrap_or(Status::UNKNOWN),
    };
    let mut state = StateResponse { pid: claimed.pid, status: EnumOrUnknown::new(known), ..Default::default() };
    if known == Status::STOPPED {
        let exit = recorded.unwrap_or_else(|| exit(claimed.exit_status, claimed.exited_at.as_ref(), now));
        state.exit_status = exit.status;
        state.exited_at = MessageField::some(exit.at);
    }
    state
}

/// The reply to a deletion. The shim's own record of the exit counts, if there is one.
pub(crate) fn deleted(claimed: &DeleteResponse, recorded: Option<Exit>, now: &Timestamp) -> DeleteResponse {
    let exit = recorded.unwrap_or_else(|| exit(claimed.exit_status, claimed.exited_at.as_ref(), now));
    DeleteResponse {
        pid: claimed.pid,
        exit_status: exit.status,
        exited_at: MessageField::some(exit.at),
        ..Default::default()
    }
}

/// A container's processes. `find` returns the process that runs with a PID in the guest.
pub(crate) fn processes(
    claimed: &PidsResponse,
    find: impl Fn(u32) -> Option<Arc<Process>>,
) -> Result<PidsResponse, InvalidReply> {
    if claimed.processes.len() > PROCESSES_MAX {
        return Err(InvalidReply::Processes(claimed.processes.len()));
    }
    let listed = |claimed: &ProcessInfo| {
        let Some(process) = find(claimed.pid) else {
            return Ok(ProcessInfo { pid: claimed.pid, ..Default::default() });
        };
        let mut listed = ProcessInfo { pid: process.pid(), ..Default::default() };
        if !process.exec_id.is_empty() {
            let details = ProcessDetails { exec_id: process.exec_id.clone(), ..Default::default() };
            let value = details.write_to_bytes().map_err(|_| InvalidReply::Encode)?;
            let type_url = PROCESS_DETAILS.to_owned();
            listed.info = MessageField::some(Any { type_url, value, ..Default::default() });
        }
        Ok(listed)
    };
    let processes = claimed.processes.iter().map(listed).collect::<Result<_, _>>()?;
    Ok(PidsResponse { processes, ..Default::default() })
}

/// A container's resource usage, of which containerd's clients decode the numbers.
pub(crate) fn stats(claimed: StatsResponse) -> Result<StatsResponse, InvalidReply> {
    let value = claimed.stats.into_option().unwrap_or_default().value;
    if value.len() > STATS_MAX {
        return Err(InvalidReply::Stats(value.len()));
    }
    let stats = MessageField::some(Any { type_url: METRICS.to_owned(), value, ..Default::default() });
    Ok(StatsResponse { stats, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio::Stdio;

    const NOW: i64 = 1_700_000_000;

    fn at(seconds: i64) -> Timestamp {
        Timestamp { seconds, ..Default::default() }
    }

    #[test]
    fn impossible_exits_are_replaced_and_the_shims_record_counts() {
        let (now, recorded) = (at(NOW), Exit { status: 7, at: at(NOW - 5) });
        let table = [
            (3, Some(at(NOW - 100_000)), None, Exit { status: 3, at: at(NOW - 100_000) }),
            (3, Some(at(NOW + 3600)), None, Exit { status: 3, at: at(NOW) }),
            (3, Some(at(-1)), None, Exit { status: 3, at: at(NOW) }),
            (u32::MAX, None, None, Exit { status: 255, at: at(NOW) }),
            (u32::MAX, Some(at(i64::MAX)), Some(recorded.clone()), recorded),
        ];
        for (exit_status, exited_at, recorded, expected) in table {
            let exited_at = MessageField::from_option(exited_at);
            let (status, id) = (EnumOrUnknown::new(Status::STOPPED), "x".repeat(1 << 20));
            let claimed =
                StateResponse { id, pid: 9, status, exit_status, exited_at: exited_at.clone(), ..Default::default() };
            let valid = state(&claimed, recorded.clone(), &now);
            let with = |exit: &Exit| (exit.status, MessageField::some(exit.at.clone()));
            assert_eq!((valid.exit_status, valid.exited_at.clone()), with(&expected));
            assert!(valid.id.is_empty() && valid.pid == 9);
            let claimed = DeleteResponse { pid: 9, exit_status, exited_at, ..Default::default() };
            let valid = deleted(&claimed, recorded, &now);
            assert_eq!((valid.exit_status, valid.exited_at.clone()), with(&expected));
        }
        let odd = StateResponse { status: EnumOrUnknown::from_i32(99), exit_status: 300, ..Default::default() };
        let valid = state(&odd, None, &now);
        assert_eq!((valid.status.enum_value(), valid.exit_status), (Ok(Status::UNKNOWN), 0));
        // The guest denies an exit that the shim has reported.
        let valid = state(&odd, Some(Exit { status: 7, at: at(NOW) }), &now);
        assert_eq!((valid.status.enum_value(), valid.exit_status), (Ok(Status::STOPPED), 7));
    }

    #[test]
    fn lists_and_statistics_are_bounded_and_contain_only_what_the_host_knows() {
        let exec = Arc::new(Process::new("e", Stdio::default(), 4242));
        exec.set_guest_pid(7);
        let find = |pid| (pid == 7).then(|| exec.clone());
        let info = Any { type_url: "evil".into(), value: vec![0x1b; 1 << 20], ..Default::default() };
        let claimed = |pid| ProcessInfo { pid, info: MessageField::some(info.clone()), ..Default::default() };
        let list = PidsResponse { processes: vec![claimed(7), claimed(8)], ..Default::default() };
        let valid = processes(&list, find).unwrap().processes;
        assert_eq!((valid[0].pid, valid[1].pid, valid[1].info.is_none()), (4242, 8, true));
        let details = ProcessDetails::parse_from_bytes(&valid[0].info.value).unwrap();
        assert_eq!((valid[0].info.type_url.as_str(), details.exec_id.as_str()), (PROCESS_DETAILS, "e"));
        let many = PidsResponse { processes: vec![ProcessInfo::new(); PROCESSES_MAX + 1], ..Default::default() };
        assert_eq!(processes(&many, find), Err(InvalidReply::Processes(PROCESSES_MAX + 1)));

        let sized = |length| StatsResponse {
            stats: MessageField::some(Any { type_url: "evil".into(), value: vec![1; length], ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(stats(sized(STATS_MAX)).unwrap().stats.type_url, METRICS);
        assert_eq!(stats(sized(STATS_MAX + 1)), Err(InvalidReply::Stats(STATS_MAX + 1)));
    }
}
