//! What is planned with the nodes of a job: drains, maintenance, the end of its reservation.
//!
//! Contract: [`outlook`] asks the controller three things, one after the other: the job, its nodes,
//! the reservations. Where nodes or reservations are hidden from users (`PrivateData`), nothing is
//! known to be planned.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::view::time;
use super::{JobView, SlurmError, command};
use crate::evacuation;

/// When a job ends and what is planned with its nodes, as far as Slurm says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outlook {
    /// The end of its time limit, or of its GraceTime.
    pub end: Option<SystemTime>,
    /// It is being pre-empted and uses its GraceTime.
    #[serde(default)]
    pub preempted: bool,
    /// Whether it has a script that Slurm may start again.
    pub can_requeue: bool,
    /// One of its nodes is to be emptied: the number of the evacuation.
    pub evacuation: Option<String>,
    /// One of its nodes takes no more jobs, for whatever reason.
    pub drain: bool,
    /// When maintenance is reserved to begin on one of its nodes, at the earliest.
    pub maintenance: Option<SystemTime>,
    /// When the reservation ends that it runs in.
    pub reservation_end: Option<SystemTime>,
}

/// What the controller says of job `id`, of its nodes and of the reservations, now.
pub fn outlook(id: u32) -> Result<Outlook, SlurmError> {
    let text = super::show(id)?;
    let view = super::view_in(&text, id)?;
    let place = Place::parse(&text, id);
    let mut outlook = Outlook {
        end: view.end_time,
        preempted: view.preempt_time.is_some(),
        can_requeue: can_requeue(&view),
        ..Outlook::default()
    };
    if place.nodes.is_empty() {
        return Ok(outlook);
    }
    let plans = nodes(&place.nodes).and_then(|nodes| {
        let reservations = command::run("scontrol", &["show", "reservation", "-o"])?;
        Ok((nodes, Reservation::parse_all(&reservations)))
    });
    match plans {
        Ok((nodes, reservations)) => {
            planned(&mut outlook, &place, &nodes, &reservations, |list| {
                hostnames(list)
            })?
        }
        Err(why) => log::debug!("what is planned with job {id}'s nodes is not known: {why}"),
    }
    Ok(outlook)
}

fn can_requeue(view: &JobView) -> bool {
    view.batch && view.requeue
}

/// Puts what nodes and reservations say into an outlook. `names` expands a list of nodes.
fn planned(
    outlook: &mut Outlook,
    place: &Place,
    nodes: &[Node],
    reservations: &[Reservation],
    names: impl Fn(&str) -> Result<Vec<String>, SlurmError>,
) -> Result<(), SlurmError> {
    let draining = || nodes.iter().filter(|node| node.drain);
    outlook.drain = draining().next().is_some();
    outlook.evacuation = draining().find_map(|node| evacuation::wish_in(&node.reason));
    for reservation in reservations {
        if Some(&reservation.name) == place.reservation.as_ref() {
            // Slurm ends no job for the end of a flexible one (job_time_limit()).
            if !reservation.has("FLEX") {
                outlook.reservation_end = reservation.end;
            }
            continue;
        }
        let Some(start) = reservation.start.filter(|_| reservation.has("MAINT")) else {
            continue;
        };
        // A job that was started on the node in spite of the maintenance is not in its way.
        if place.start.is_none_or(|begun| start <= begun) {
            continue;
        }
        let own = names(&place.nodes)?;
        if names(&reservation.nodes)?
            .iter()
            .any(|node| own.contains(node))
        {
            let earliest = outlook.maintenance.map_or(start, |other| other.min(start));
            outlook.maintenance = Some(earliest);
        }
    }
    Ok(())
}

/// Where and since when a job runs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Place {
    /// As Slurm writes lists, of all components of a het job.
    nodes: String,
    start: Option<SystemTime>,
    reservation: Option<String>,
}

impl Place {
    fn parse(text: &str, id: u32) -> Place {
        let (own, component) = (format!("JobId={id} "), format!(" HetJobId={id} "));
        let mut place = Place::default();
        for line in text.lines() {
            if !line.starts_with(&own) && !line.contains(&component) {
                continue;
            }
            if let Some(nodes) = word(line, "NodeList") {
                if !place.nodes.is_empty() {
                    place.nodes.push(',');
                }
                place.nodes += nodes;
            }
            if line.starts_with(&own) {
                place.start = word(line, "StartTime").and_then(time);
                place.reservation = word(line, "Reservation").map(str::to_owned);
            }
        }
        place
    }
}

/// The value of `key` in a line of an answer.
fn word<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .filter(|value| !value.is_empty() && *value != "(null)")
}

/// A node, as far as it decides something for us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    /// Whether it takes no more jobs.
    pub drain: bool,
    /// Why; empty if nobody said so.
    pub reason: String,
}

/// The nodes of a list such as `n1` or `n[1-4]`.
pub fn nodes(list: &str) -> Result<Vec<Node>, SlurmError> {
    command::run("scontrol", &["show", "node", "-o", list]).map(|text| Node::parse_all(&text))
}

impl Node {
    fn parse_all(text: &str) -> Vec<Node> {
        let parse = |line: &str| {
            let state = word(line, "State")?;
            // `MIXED+DRAIN`; a state may be followed by a sign (`IDLE*`: it does not respond).
            let drain = state
                .split('+')
                .map(|part| part.trim_end_matches(|c: char| !c.is_ascii_alphabetic()))
                .any(|part| matches!(part, "DRAIN" | "DRAINING" | "DRAINED"));
            // `Reason=any words [root@2026-11-26T10:50:08]`.
            let reason = line.split_once(" Reason=").map_or("", |(_, rest)| rest);
            let reason = match reason.rfind(" [").filter(|at| reason[*at..].contains('@')) {
                Some(at) => &reason[..at],
                None => reason.trim_end(),
            };
            Some(Node {
                name: word(line, "NodeName")?.to_owned(),
                drain,
                reason: reason.to_owned(),
            })
        };
        text.lines().filter_map(parse).collect()
    }
}

/// The single names of a list of nodes. No question to the controller.
pub fn hostnames(list: &str) -> Result<Vec<String>, SlurmError> {
    let text = command::run("scontrol", &["show", "hostnames", list])?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// A reservation.
#[derive(Debug, PartialEq, Eq)]
struct Reservation {
    name: String,
    start: Option<SystemTime>,
    end: Option<SystemTime>,
    nodes: String,
    flags: String,
}

impl Reservation {
    /// Also of "No reservations in the system".
    fn parse_all(text: &str) -> Vec<Reservation> {
        let parse = |line: &str| {
            Some(Reservation {
                name: word(line, "ReservationName")?.to_owned(),
                start: word(line, "StartTime").and_then(time),
                end: word(line, "EndTime").and_then(time),
                nodes: word(line, "Nodes").unwrap_or("").to_owned(),
                flags: word(line, "Flags").unwrap_or("").to_owned(),
            })
        };
        text.lines().filter_map(parse).collect()
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.split(',').any(|other| other == flag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOBS: &str = "\
        JobId=7 HetJobId=7 HetJobOffset=0 JobName=a UserId=alice(1001) JobState=RUNNING Requeue=1 \
        BatchFlag=1 StartTime=2026-11-26T10:00:00 EndTime=2026-11-26T12:00:00 ReqNodeList=n9 \
        NodeList=n1 Reservation=own Comment=x \n\
        JobId=8 HetJobId=7 HetJobOffset=1 JobState=RUNNING NodeList=n[3-4]\n\
        JobId=9 JobState=RUNNING NodeList=n5\n";

    const NODES: &str = "\
        NodeName=n1 Arch=x86_64 State=MIXED+DRAIN Reason=fan is loud [2]; container-checkpoint \
        evacuate #1f3a9c07 [root@2026-11-26T10:50:08]\n\
        NodeName=n3 State=ALLOCATED+DRAINING* Reason=none\nNodeName=n4 State=IDLE\n";

    const RESERVATIONS: &str = "\
        ReservationName=own StartTime=2026-11-26T09:00:00 EndTime=2026-11-26T11:30:00 Nodes=n1 \
        Flags=SPEC_NODES\n\
        ReservationName=late StartTime=2026-11-26T12:00:00 EndTime=2026-11-26T13:00:00 \
        Nodes=n[3-9] Flags=MAINT,IGNORE_JOBS,SPEC_NODES\n\
        ReservationName=soon StartTime=2026-11-26T11:00:00 EndTime=2026-11-26T13:00:00 \
        Nodes=n[1-2] Flags=MAINT\n\
        ReservationName=elsewhere StartTime=2026-11-26T10:30:00 EndTime=2026-11-26T13:00:00 \
        Nodes=n2 Flags=MAINT\n\
        ReservationName=before StartTime=2026-11-26T10:00:00 EndTime=2026-11-26T13:00:00 \
        Nodes=n1 Flags=MAINT\n\
        ReservationName=usual StartTime=2026-11-26T10:30:00 EndTime=2026-11-26T13:00:00 Nodes=n1 \
        Flags=SPEC_NODES\n";

    fn names(list: &str) -> Result<Vec<String>, SlurmError> {
        let all = match list {
            "n1,n[3-4]" => "n1 n3 n4",
            "n[3-9]" => "n3 n4 n5 n6 n7 n8 n9",
            "n[1-2]" => "n1 n2",
            one => one,
        };
        Ok(all.split(' ').map(str::to_owned).collect())
    }

    #[test]
    fn what_is_planned_with_a_jobs_nodes_is_read() {
        let place = Place::parse(JOBS, 7);
        assert_eq!(place.nodes, "n1,n[3-4]");
        assert_eq!(place.start, time("2026-11-26T10:00:00"));
        let mut outlook = Outlook::default();
        let reservations = Reservation::parse_all(RESERVATIONS);
        planned(
            &mut outlook,
            &place,
            &Node::parse_all(NODES),
            &reservations,
            names,
        )
        .unwrap();
        let expected = Outlook {
            evacuation: Some("1f3a9c07".into()),
            drain: true,
            maintenance: time("2026-11-26T11:00:00"),
            reservation_end: time("2026-11-26T11:30:00"),
            ..Outlook::default()
        };
        assert_eq!(outlook, expected);
        let text = serde_json::to_string(&outlook).unwrap();
        assert_eq!(serde_json::from_str::<Outlook>(&text).unwrap(), outlook);
    }

    #[test]
    fn nothing_is_planned_where_nothing_is() {
        let place = Place::parse(JOBS, 9);
        assert_eq!((place.nodes.as_str(), &place.reservation), ("n5", &None));
        let node = "NodeName=n5 State=IDLE Reason=container-checkpoint evacuate #1f3a9c07 [a@b]";
        let nodes = Node::parse_all(node);
        assert_eq!(nodes[0].reason, "container-checkpoint evacuate #1f3a9c07");
        let none = Reservation::parse_all("No reservations in the system");
        let mut outlook = Outlook::default();
        planned(&mut outlook, &place, &nodes, &none, names).unwrap();
        // Drained once and resumed since: what is left of the reason asks for nothing.
        assert_eq!(outlook, Outlook::default());
    }

    #[test]
    fn a_flexible_reservation_ends_no_job() {
        let flexible = RESERVATIONS.replace("Nodes=n1 Flags=SPEC", "Nodes=n1 Flags=FLEX,SPEC");
        let mut outlook = Outlook::default();
        let place = Place {
            nodes: "n1".into(),
            reservation: Some("own".into()),
            start: None,
        };
        planned(
            &mut outlook,
            &place,
            &[],
            &Reservation::parse_all(&flexible),
            names,
        )
        .unwrap();
        assert_eq!(outlook, Outlook::default());
    }
}
