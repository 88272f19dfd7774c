//! Sends every frame that arrives at one device out of another: an ingress qdisc with one filter, whose action is
//! `mirred egress redirect`. Sources: tc-mirred(8), tc-matchall(8), tc-u32(8), linux/pkt_cls.h, linux/pkt_sched.h.

use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterMatchAll, TcFilterMatchAllOption, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::error::{NetlinkError, ObjectError};
use super::netlink::Netlink;

/// The kind of qdisc.
const INGRESS: &str = "ingress";
/// `ffff:`, the handle of every ingress qdisc and the parent of its filters.
const HANDLE: TcHandle = TcHandle { major: u16::MAX, minor: 0 };
/// Preference of husk's filters, which identifies them. Nobody else is likely to have it: where the user of `tc` gives
/// none, the kernel chooses 49152, 49151 and so on.
const PREFERENCE: u16 = 0x6875;
/// Preference of a mark: a second redirect, which no frame reaches.
const MARK: u16 = PREFERENCE + 1;
/// Where `tcm_info` is in a message: after `struct nlmsghdr` and the other fields of `struct tcmsg`.
const INFO: std::ops::Range<usize> = 32..36;
/// Pause before an EBUSY is retried: the kernel is changing the same device.
const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// How often an EBUSY is retried.
const BUSY_RETRIES: usize = 200;

/// How a filter matches every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Classifier {
    /// `matchall`.
    MatchAll,
    /// `u32 match u8 0 0`, for kernels without `cls_matchall`.
    U32,
}

/// A device of the thread's namespace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Device<'a> {
    pub(super) index: u32,
    pub(super) name: &'a str,
}

/// Redirects what arrives at `from` to `to`. Replaces an earlier redirect of husk. `classifier` becomes what the kernel
/// has.
pub(super) fn redirect(
    netlink: &mut Netlink,
    classifier: &mut Classifier,
    from: Device<'_>,
    to: Device<'_>,
) -> Result<(), ObjectError> {
    let object = || format!("link {}", from.name);
    let qdisc = RouteNetlinkMessage::NewQueueDiscipline(ingress(from.index));
    match retry_busy(netlink, |netlink| netlink.change(qdisc.clone(), NLM_F_CREATE | NLM_F_EXCL)) {
        Err(error) if error.errno() == Some(libc::EEXIST) => match ingress_kind(netlink, from)?.as_deref() {
            // The redirect of an earlier VM leads to a tap that is gone.
            Some(INGRESS) => remove_filter(netlink, from, PREFERENCE)?,
            kind => {
                let kind = kind.unwrap_or("unknown");
                let reason = format!("its ingress has a qdisc of kind {kind}, which husk cannot share");
                return Err(ObjectError::unsupported(object(), reason));
            }
        },
        other => other.map_err(|error| error.at(object(), "add an ingress qdisc"))?,
    }
    let mut add = |classifier| {
        let message = RouteNetlinkMessage::NewTrafficFilter(filter(from.index, to.index, classifier, PREFERENCE));
        retry_busy(netlink, |netlink| netlink.change(message.clone(), NLM_F_CREATE | NLM_F_EXCL))
    };
    match add(*classifier) {
        // The kernel has no matchall, or no mirred; the second attempt finds out.
        Err(error) if error.errno() == Some(libc::ENOENT) && *classifier == Classifier::MatchAll => {
            *classifier = Classifier::U32;
            add(*classifier)
        }
        other => other,
    }
    .map_err(|error| error.at(object(), "add a filter that redirects to the tap (u32 or matchall with mirred)"))
}

/// Marks a device whose redirect exists. It may be marked already.
pub(super) fn mark(
    netlink: &mut Netlink,
    classifier: Classifier,
    from: Device<'_>,
    to: Device<'_>,
) -> Result<(), ObjectError> {
    let message = RouteNetlinkMessage::NewTrafficFilter(filter(from.index, to.index, classifier, MARK));
    match retry_busy(netlink, |netlink| netlink.change(message.clone(), NLM_F_CREATE | NLM_F_EXCL)) {
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
        other => other.map_err(|error| error.at(format!("link {}", from.name), "add husk's mark")),
    }
}

/// Whether [`mark`] has marked a device.
pub(super) fn is_marked(netlink: &mut Netlink, from: Device<'_>) -> Result<bool, ObjectError> {
    if !has_ingress(netlink, from)? {
        return Ok(false);
    }
    // Filters of other programs may be of kinds that the decoder does not know.
    let preference = |bytes: &[u8]| {
        let info = bytes.get(INFO).and_then(|info| info.try_into().ok()).map(u32::from_ne_bytes);
        Ok(info.map(|info| info >> 16))
    };
    netlink
        .list(&filters(from.index), preference)
        .map(|found| found.contains(&Some(MARK.into())))
        .or_else(|error| if is_gone(&error) { Ok(false) } else { Err(error) })
        .map_err(|error| error.at(format!("link {}", from.name), "list its filters"))
}

/// Removes the mark of a device.
pub(super) fn unmark(netlink: &mut Netlink, from: Device<'_>) -> Result<(), ObjectError> {
    remove_filter(netlink, from, MARK)
}

/// Whether a device has an ingress qdisc, and so perhaps a redirect.
pub(super) fn has_ingress(netlink: &mut Netlink, from: Device<'_>) -> Result<bool, ObjectError> {
    Ok(ingress_kind(netlink, from)?.as_deref() == Some(INGRESS))
}

/// Removes husk's redirect, and the ingress qdisc unless it has other filters. Does nothing if they are gone.
pub(super) fn remove(netlink: &mut Netlink, from: Device<'_>) -> Result<(), ObjectError> {
    let object = || format!("link {}", from.name);
    if !has_ingress(netlink, from)? {
        return Ok(());
    }
    remove_filter(netlink, from, PREFERENCE)?;
    let others = netlink
        .count(&filters(from.index))
        .or_else(|error| if is_gone(&error) { Ok(0) } else { Err(error) })
        .map_err(|error| error.at(object(), "list its filters"))?;
    if others > 0 {
        return Ok(());
    }
    let qdisc = RouteNetlinkMessage::DelQueueDiscipline(ingress(from.index));
    ignore_gone(retry_busy(netlink, |netlink| netlink.change(qdisc.clone(), 0)))
        .map_err(|error| error.at(object(), "remove its ingress qdisc"))
}

fn remove_filter(netlink: &mut Netlink, from: Device<'_>, preference: u16) -> Result<(), ObjectError> {
    // Without a handle: every filter of the preference.
    let message = RouteNetlinkMessage::DelTrafficFilter(filter_header(from.index, preference));
    ignore_gone(retry_busy(netlink, |netlink| netlink.change(message.clone(), 0)))
        .map_err(|error| error.at(format!("link {}", from.name), "remove husk's filter"))
}

/// The kind of qdisc at a device's ingress, if it has one.
fn ingress_kind(netlink: &mut Netlink, from: Device<'_>) -> Result<Option<String>, ObjectError> {
    let mut message = TcMessage::with_index(index(from.index));
    message.header.parent = TcHandle::INGRESS;
    match netlink.get(RouteNetlinkMessage::GetQueueDiscipline(message)) {
        Ok(Some(RouteNetlinkMessage::NewQueueDiscipline(qdisc))) => {
            Ok(qdisc.attributes.into_iter().find_map(|attribute| match attribute {
                TcAttribute::Kind(kind) => Some(kind),
                _ => None,
            }))
        }
        Ok(_) => Ok(None),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error.at(format!("link {}", from.name), "get its ingress qdisc")),
    }
}

/// The qdisc, filter or device is gone. EINVAL: a filter's qdisc is.
fn is_gone(error: &NetlinkError) -> bool {
    matches!(error.errno(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL))
}

fn ignore_gone(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    result.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) })
}

fn retry_busy(
    netlink: &mut Netlink,
    mut attempt: impl FnMut(&mut Netlink) -> Result<(), NetlinkError>,
) -> Result<(), NetlinkError> {
    for _ in 0..BUSY_RETRIES {
        match attempt(netlink) {
            Err(error) if error.errno() == Some(libc::EBUSY) && Instant::now() + BUSY_PAUSE < netlink.deadline() => {}
            other => return other,
        }
        std::thread::sleep(BUSY_PAUSE);
    }
    attempt(netlink)
}

/// The ingress qdisc of a device.
fn ingress(device: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index(device));
    message.header.handle = HANDLE;
    message.header.parent = TcHandle::INGRESS;
    message.attributes.push(TcAttribute::Kind(INGRESS.to_owned()));
    message
}

/// Lists the filters of a device.
fn filters(device: u32) -> RouteNetlinkMessage {
    let mut message = TcMessage::with_index(index(device));
    message.header.parent = HANDLE;
    RouteNetlinkMessage::GetTrafficFilter(message)
}

/// Identifies husk's filter of a device with this preference.
fn filter_header(device: u32, preference: u16) -> TcMessage {
    let mut message = TcMessage::with_index(index(device));
    message.header.parent = HANDLE;
    // The protocol is in network byte order.
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    message.header.info = u32::from(preference) << 16 | u32::from(protocol);
    message
}

/// The filter that redirects everything from one device to another.
fn filter(from: u32, to: u32, classifier: Classifier, preference: u16) -> TcMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes.push(TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()));
    action
        .attributes
        .push(TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]));
    let actions = vec![action];

    let mut message = filter_header(from, preference);
    let (kind, options) = match classifier {
        Classifier::MatchAll => {
            (TcFilterMatchAll::KIND, vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(actions))])
        }
        Classifier::U32 => {
            let mut selector = TcU32Selector::default();
            selector.flags = TcU32SelectorFlags::Terminal;
            selector.nkeys = 1;
            // Value 0 under mask 0 at offset 0.
            selector.keys.push(TcU32Key::default());
            let options = [TcFilterU32Option::Selector(selector), TcFilterU32Option::Action(actions)];
            (TcFilterU32::KIND, options.map(TcOption::U32).to_vec())
        }
    };
    message.attributes.push(TcAttribute::Kind(kind.to_owned()));
    message.attributes.push(TcAttribute::Options(options));
    message
}

/// Indexes are positive ints in the kernel; this one has the wrong sign in `struct tcmsg` only.
fn index(device: u32) -> i32 {
    device.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::error::NetworkError;
    use crate::network::netns::claim;
    use crate::network::testing::Namespace;
    use husk_protos::chain::Chain;
    use netlink_packet_core::Emitable;
    use serde_json::Value;

    /// Runs `work` in a namespace, with a device named `from` and one named `to`.
    fn within(
        namespace: &Namespace,
        work: impl FnOnce(&mut Netlink, Device<'_>, Device<'_>) -> Result<(), ObjectError> + Send + 'static,
    ) -> Result<(), NetworkError> {
        let index = |name: &str| {
            u32::try_from(namespace.ip_json(&format!("link show dev {name}"))[0]["ifindex"].as_u64().unwrap()).unwrap()
        };
        let (from, to) = (index("from"), index("to"));
        claim(&namespace.path()).unwrap().run(Duration::from_secs(5), move |deadline| {
            let mut netlink = Netlink::open(deadline).unwrap();
            work(&mut netlink, Device { index: from, name: "from" }, Device { index: to, name: "to" })
        })
    }

    fn devices() -> Namespace {
        let namespace = Namespace::new();
        namespace.ip("link add from type veth peer name to");
        namespace
    }

    fn qdiscs(namespace: &Namespace) -> Vec<String> {
        let shown: Value = serde_json::from_str(&namespace.tc("-j qdisc show dev from")).unwrap();
        let kinds = shown.as_array().unwrap().iter().map(|qdisc| qdisc["kind"].as_str().unwrap().to_owned());
        kinds.filter(|kind| kind != "noqueue").collect()
    }

    /// Targets of the redirects of `from`, as `tc` shows them.
    fn targets(namespace: &Namespace) -> Vec<String> {
        let shown: Value = serde_json::from_str(&namespace.tc("-j filter show dev from ingress")).unwrap();
        let mut targets = Vec::new();
        for filter in shown.as_array().unwrap() {
            for action in filter["options"]["actions"].as_array().into_iter().flatten() {
                let text = |key: &str| action[key].as_str().unwrap().to_owned();
                assert_eq!((text("mirred_action"), text("direction")), ("redirect".into(), "egress".into()));
                assert_eq!((filter["pref"].as_u64(), filter["protocol"].as_str()), (Some(26741), Some("all")));
                targets.push(text("to_dev"));
            }
        }
        targets
    }

    #[test]
    fn a_redirect_is_made_once_and_removed_without_a_trace() {
        let namespace = devices();
        for _ in 0..2 {
            within(&namespace, |netlink, from, to| redirect(netlink, &mut Classifier::MatchAll, from, to)).unwrap();
            assert_eq!(targets(&namespace), ["to"]);
            assert_eq!(qdiscs(&namespace), ["ingress"]);
        }
        for _ in 0..2 {
            within(&namespace, |netlink, from, _| remove(netlink, from)).unwrap();
            assert!(qdiscs(&namespace).is_empty());
        }
    }

    #[test]
    fn u32_works_on_every_kernel() {
        let namespace = devices();
        within(&namespace, |netlink, from, to| redirect(netlink, &mut Classifier::U32, from, to)).unwrap();
        assert_eq!(targets(&namespace), ["to"]);
    }

    #[test]
    fn filters_of_others_stay() {
        let namespace = devices();
        namespace.tc("qdisc add dev from ingress");
        namespace.tc("filter add dev from parent ffff: protocol ip prio 7 u32 match u8 0 0 flowid 1:1");
        within(&namespace, |netlink, from, to| {
            redirect(netlink, &mut Classifier::MatchAll, from, to)?;
            remove(netlink, from)
        })
        .unwrap();
        assert_eq!(qdiscs(&namespace), ["ingress"]);
        assert!(namespace.tc("filter show dev from ingress").contains("pref 7"));
    }

    #[test]
    fn a_clsact_qdisc_is_rejected_and_stays() {
        let namespace = devices();
        namespace.tc("qdisc add dev from clsact");
        let error = within(&namespace, |netlink, from, to| redirect(netlink, &mut Classifier::MatchAll, from, to));
        let text = Chain(&error.unwrap_err()).to_string();
        assert!(text.contains("link from: its ingress has a qdisc of kind clsact, which husk cannot share"), "{text}");
        within(&namespace, |netlink, from, _| remove(netlink, from)).unwrap();
        assert_eq!(qdiscs(&namespace), ["clsact"]);
    }

    #[test]
    fn removing_from_a_device_that_is_gone_is_fine() {
        within(&devices(), |netlink, _, _| remove(netlink, Device { index: 4711, name: "gone" })).unwrap();
    }

    #[test]
    fn a_filter_is_encoded_as_tc_does() {
        // `tc filter add dev 2 parent ffff: pref 26741 protocol all matchall action mirred egress redirect dev 3`
        let message = filter(2, 3, Classifier::MatchAll, PREFERENCE);
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let mut expected = vec![0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 3, 0x75, 0x68];
        expected.extend(*b"\x0d\0\x01\0matchall\0\0\0\0"); // TCA_KIND
        expected.extend([60, 0, 2, 0]); // TCA_OPTIONS
        expected.extend([56, 0, 2, 0]); // TCA_MATCHALL_ACT
        expected.extend([52, 0, 1, 0]); // the first action
        expected.extend(*b"\x0b\0\x01\0mirred\0\0"); // TCA_ACT_KIND
        expected.extend([36, 0, 2, 0x80]); // TCA_ACT_OPTIONS, NLA_F_NESTED
        expected.extend([32, 0, 2, 0]); // TCA_MIRRED_PARMS: index, capabilities, action, two counters, eaction, ifindex
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes, expected);
    }
}
