//! When to save, and what to do afterwards: decisions only, no I/O, no clock of its own.
//!
//! Contract: everything here is a pure function of what `supervise` has found out. `supervise` acts.

use std::time::{Duration, SystemTime};

use crate::slurm::outlook::Outlook;
use crate::slurm::{JobView, Notice, Phase};
use crate::store::{BegunRun, ProgressedRun, Trigger};

/// Why the job was told to end, as far as Slurm says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It is being pre-empted and has some time left (GraceTime): it runs on until somebody
    /// requeues it or the time is over.
    Grace,
    /// It is ending, and Slurm starts it again by itself.
    Requeue,
    TimeLimit,
    Cancelled,
    /// It is ending, and Slurm does not start it again. Not more is known.
    Ending,
    /// The job runs on: only this process was told to end.
    Signal,
    /// The user asked for the job to be saved and ended (`save --stop`).
    ExitRequest,
    /// A node of the job is to be empty: it is drained, or maintenance begins.
    Emptying,
    /// Slurm did not answer.
    Unknown,
}

/// How close to its end a running job that gets SIGTERM is taken to be at its time limit. Slurm
/// looks for expired jobs every 30 s and signals `--signal` jobs up to 60 s early (facts of
/// slurmctld's job_time_limit()).
const NEAR_THE_END: Duration = Duration::from_secs(90);

/// Why a job was told to end. `run` is the restart count of the run that asks.
pub fn cause(view: &JobView, run: u32, now: SystemTime) -> Cause {
    // Slurm counts a restart when it decides on it, while the old run is still completing.
    if view.restarts > run {
        return Cause::Requeue;
    }
    match view.phase {
        Phase::Requeuing | Phase::Pending => Cause::Requeue,
        Phase::Cancelled => Cause::Cancelled,
        Phase::TimedOut => Cause::TimeLimit,
        Phase::Running | Phase::Suspended => {
            if view.preempt_time.is_some() {
                Cause::Grace
            } else if view.end_time.is_some_and(|end| end < now + NEAR_THE_END) {
                Cause::TimeLimit
            } else {
                Cause::Signal
            }
        }
        // A job that Slurm requeues has been counted above.
        Phase::Ending | Phase::Ended => Cause::Ending,
    }
}

/// What is written down as the trigger of a checkpoint that was ordered for `ordered`, once it is
/// known why the job was told to end: SIGTERM alone does not say.
pub fn trigger(ordered: Trigger, cause: Option<Cause>) -> Trigger {
    match (ordered, cause) {
        (Trigger::Preemption, Some(Cause::TimeLimit)) => Trigger::TimeLimit,
        // Somebody wants the job to end.
        (Trigger::Preemption, Some(Cause::Cancelled)) => Trigger::ExitRequest,
        (Trigger::Preemption, Some(Cause::Signal)) => Trigger::Signal,
        // The end that was near was that of a grace time.
        (Trigger::TimeLimit, Some(Cause::Grace)) => Trigger::Preemption,
        (ordered, _) => ordered,
    }
}

/// Whether nothing is saved of a job that ends for this cause, where `on_cancel` is `discard`. In
/// doubt it is saved.
pub fn discards(cause: Cause) -> bool {
    cause == Cause::Cancelled
}

/// What becomes of the job once its application is saved and stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Ask Slurm to requeue the job, then wait to be killed.
    Requeue,
    /// The same, but it is held until somebody releases it.
    Hold,
    /// End, by the signal that asked for it.
    End,
    /// Ask Slurm to cancel the job, so that its script does not go on.
    Cancel,
    /// Slurm did not say why: ask again, as long as this process lives.
    AskAgain,
}

/// What to do after the application was saved and stopped. `batch` says whether the job has a
/// script that Slurm could start again, `stuck` whether its runs come to nothing ([`is_stuck`]).
pub fn after_stop(cause: Cause, batch: bool, requeue_at_time_limit: bool, stuck: bool) -> After {
    let requeue = if stuck { After::Hold } else { After::Requeue };
    match cause {
        Cause::Grace if batch => requeue,
        Cause::TimeLimit if batch && requeue_at_time_limit => requeue,
        Cause::Emptying if batch => requeue,
        Cause::Unknown => After::AskAgain,
        // One that cannot be requeued is not stopped, unless that has just changed.
        Cause::ExitRequest | Cause::Emptying => After::Cancel,
        // Slurm has decided already. A job that comes to nothing is held when it starts again.
        Cause::Grace
        | Cause::TimeLimit
        | Cause::Requeue
        | Cause::Cancelled
        | Cause::Ending
        | Cause::Signal => After::End,
    }
}

/// CPU time from which on a run has computed something: what the kernel's clock ticks in.
const COMPUTED: Duration = Duration::from_millis(10);

/// Whether a run has got on: something new is saved, and the application had computed something since
/// its start in this run. Without the first the next run begins where this one did, without the
/// second all of them save the same state. In doubt it has computed: `cpu` is None where not all of
/// its processes are seen.
pub fn has_progressed(saved: bool, cpu: Option<Duration>) -> bool {
    saved && cpu.is_none_or(|cpu| cpu >= COMPUTED)
}

/// How many runs in a row, right before run `run` of `job`, came to nothing. `last` is the last run in
/// which an application was started, `progressed` the last one that got on. A run in which nothing of
/// ours was started says nothing and is not counted.
pub fn runs_without_progress(
    last: Option<BegunRun>,
    progressed: Option<ProgressedRun>,
    (job, run): (u32, u32),
) -> u32 {
    let got_on = |run| progressed == Some(ProgressedRun { job, run });
    match last {
        // Another computation of this very run has begun before.
        Some(last) if (last.job, last.run) == (job, run) => last.without_progress,
        // It was released by somebody, and gets a new chance.
        Some(last) if last.job != job || last.run > run || last.held => 0,
        Some(last) if got_on(last.run) => 0,
        Some(last) => last.without_progress.saturating_add(1),
        None => 0,
    }
}

/// Whether so many runs without progress are enough; a `limit` of 0 never is.
pub fn is_stuck(runs: u32, limit: u32) -> bool {
    limit > 0 && runs >= limit
}

/// What a job does because one of its nodes is to be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    Stay,
    /// It is saved and runs on: Slurm could not start it again.
    Save,
    /// It is saved and requeued.
    Leave,
}

/// What a drained node asks of a job now. `on_drain` says whether any drain does; an evacuation
/// does in any case.
pub fn leaving(outlook: &Outlook, on_drain: bool) -> Leaving {
    let asked = outlook.evacuation.is_some() || outlook.drain && on_drain;
    match (asked, outlook.can_requeue) {
        (false, _) => Leaving::Stay,
        (true, false) => Leaving::Save,
        (true, true) => Leaving::Leave,
    }
}

/// What ends a job, or makes it leave, at a known time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Its time limit, its GraceTime, or its reservation is over.
    TimeLimit,
    /// Maintenance begins on one of its nodes.
    Maintenance,
}

/// The next time by which the job has to be saved: the earliest that is not `done` with. At the same
/// time, a time limit comes first. `on_maintenance` says whether maintenance counts.
pub fn deadline(
    outlook: &Outlook,
    on_maintenance: bool,
    done: &[(Due, SystemTime)],
) -> Option<(Due, SystemTime)> {
    let maintenance = outlook.maintenance.filter(|_| on_maintenance);
    [
        (Due::TimeLimit, outlook.end),
        (Due::TimeLimit, outlook.reservation_end),
        (Due::Maintenance, maintenance),
    ]
    .into_iter()
    .filter_map(|(due, time)| Some((due, time?)))
    .filter(|next| !done.contains(next))
    .min_by_key(|(_, time)| *time)
}

/// Whether a job ends once it is saved for this reason, or runs on.
pub fn stops_at(due: Due, outlook: &Outlook) -> bool {
    due == Due::TimeLimit || outlook.can_requeue
}

/// What the checkpoints of a computation cost so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Bytes of one checkpoint.
    pub bytes: u64,
    /// How long it took, from the request to the commit.
    pub took: Duration,
}

/// Bytes per second taken for a file system nothing is known of. DMTCP wrote 300 MB/s to ext4 on a
/// small machine; shared file systems are slower.
const CAUTIOUS_THROUGHPUT: f64 = 50e6;

/// What every checkpoint costs whatever its size: barriers, renames, fsync.
const FIXED: Duration = Duration::from_secs(5);

/// How long a checkpoint of `memory` resident bytes will take, from what the `last` one cost.
pub fn predicted_duration(memory: u64, last: Option<Cost>) -> Duration {
    let throughput = match last {
        // A tiny checkpoint says nothing of throughput.
        Some(cost) if cost.bytes > 32 << 20 => {
            cost.bytes as f64 / cost.took.as_secs_f64().max(0.001)
        }
        _ => CAUTIOUS_THROUGHPUT,
    };
    FIXED + Duration::from_secs_f64(memory as f64 / throughput.max(1e5))
}

/// How many bytes of memory can be saved within `notice` on a file system nothing is known of.
pub fn fits(notice: Duration, safety: f64) -> u64 {
    let time = notice.div_f64(safety.max(1.0)).saturating_sub(FIXED);
    (time.as_secs_f64() * CAUTIOUS_THROUGHPUT) as u64
}

/// How long before a deadline a checkpoint has to start.
pub fn lead_time(memory: u64, last: Option<Cost>, safety: f64) -> Duration {
    predicted_duration(memory, last).mul_f64(safety.max(1.0))
}

/// How much of a run's `time` a lead time may take: half. A run that were all lead time would be
/// saved as soon as it has begun, and the job requeued for ever without getting on.
pub fn lead_time_within(lead: Duration, time: Duration) -> Duration {
    lead.min(time / 2)
}

/// How soon a helper of the batch step knows of a pre-emption with GraceTime, of which only steps are
/// told: it looks once a minute.
const NOTICED_WITHIN: Duration = Duration::from_secs(65);

/// How long a job has from the moment in which this helper hears of its end to SIGKILL: if the job is
/// pre-empted, where it can be, else if it is cancelled or requeued.
pub fn notice(notice: &Notice, batch_step: bool) -> Duration {
    let grace = match (notice.preemptible, batch_step) {
        (false, _) => Duration::ZERO,
        (true, false) => notice.grace_time,
        (true, true) => notice.grace_time.saturating_sub(NOTICED_WITHIN),
    };
    grace + notice.kill_wait
}

/// How long a checkpoint of `memory` resident bytes has to be expected to take, for a comparison with
/// [`notice`]: what the `last` one took, scaled, else a guess.
pub fn time_to_save(memory: u64, last: Option<Cost>, safety: f64) -> Duration {
    match last {
        Some(cost) => {
            let grown = memory as f64 / cost.bytes.max(1) as f64;
            cost.took.mul_f64(grown.clamp(1.0, 1e6) * safety.max(1.0))
        }
        None => lead_time(memory, None, safety),
    }
}

/// The interval between checkpoints that loses least, by J. T. Daly, "A higher order estimate of
/// the optimum checkpoint interval for restart dumps" (2006), equation 37: `cost` of one
/// checkpoint, mean time between losses `mtbf`.
pub fn daly_interval(cost: Duration, mtbf: Duration) -> Duration {
    let (cost, mtbf) = (cost.as_secs_f64(), mtbf.as_secs_f64());
    if cost >= 2.0 * mtbf {
        return Duration::from_secs_f64(mtbf);
    }
    let ratio = cost / (2.0 * mtbf);
    let factor = 1.0 + ratio.sqrt() / 3.0 + ratio / 9.0;
    Duration::from_secs_f64(((2.0 * cost * mtbf).sqrt() * factor - cost).max(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(phase: Phase) -> JobView {
        JobView {
            target: "7".into(),
            phase,
            state: String::new(),
            end_time: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(10_000)),
            preempt_time: None,
            requeue: true,
            restarts: 1,
            batch: true,
            retried: false,
        }
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn every_cause_is_told_apart() {
        let running = view(Phase::Running);
        assert_eq!(cause(&running, 1, at(5_000)), Cause::Signal);
        assert_eq!(cause(&running, 1, at(9_950)), Cause::TimeLimit);
        assert_eq!(
            cause(&running, 0, at(5_000)),
            Cause::Requeue,
            "counted already"
        );
        let grace = JobView {
            preempt_time: Some(at(5_000)),
            ..view(Phase::Running)
        };
        // The grace time has moved the end: a pre-emption all the same.
        assert_eq!(cause(&grace, 1, at(9_999)), Cause::Grace);
        for (phase, expected) in [
            (Phase::Pending, Cause::Requeue),
            (Phase::Requeuing, Cause::Requeue),
            (Phase::Cancelled, Cause::Cancelled),
            (Phase::Ending, Cause::Ending),
            (Phase::Ended, Cause::Ending),
            (Phase::TimedOut, Cause::TimeLimit),
        ] {
            assert_eq!(cause(&view(phase), 1, at(5_000)), expected, "{phase:?}");
        }
    }

    #[test]
    fn only_what_slurm_would_lose_is_requeued() {
        for cause in CAUSES {
            for (batch, at_limit, stuck) in all_of_three() {
                let expected = match (cause, stuck) {
                    (Cause::Unknown, _) => After::AskAgain,
                    (Cause::ExitRequest, _) => After::Cancel,
                    (Cause::Grace | Cause::Emptying, false) if batch => After::Requeue,
                    (Cause::Grace | Cause::Emptying, true) if batch => After::Hold,
                    (Cause::Emptying, _) => After::Cancel,
                    (Cause::TimeLimit, false) if batch && at_limit => After::Requeue,
                    (Cause::TimeLimit, true) if batch && at_limit => After::Hold,
                    _ => After::End,
                };
                let after = after_stop(cause, batch, at_limit, stuck);
                assert_eq!(after, expected, "{cause:?}");
            }
        }
    }

    const CAUSES: [Cause; 9] = [
        Cause::Grace,
        Cause::Requeue,
        Cause::TimeLimit,
        Cause::Cancelled,
        Cause::Ending,
        Cause::Signal,
        Cause::ExitRequest,
        Cause::Emptying,
        Cause::Unknown,
    ];

    fn all_of_three() -> impl Iterator<Item = (bool, bool, bool)> {
        (0..8).map(|bits| (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0))
    }

    #[test]
    fn only_what_is_known_to_be_cancelled_is_discarded() {
        for cause in CAUSES {
            assert_eq!(discards(cause), cause == Cause::Cancelled, "{cause:?}");
        }
    }

    #[test]
    fn the_trigger_is_what_the_cause_turned_out_to_be() {
        let all = [
            Trigger::Preemption,
            Trigger::TimeLimit,
            Trigger::Interval,
            Trigger::Signal,
            Trigger::Request,
            Trigger::ExitRequest,
        ];
        for ordered in all {
            assert_eq!(trigger(ordered, None), ordered);
            for cause in CAUSES {
                let expected = match (ordered, cause) {
                    (Trigger::Preemption, Cause::TimeLimit) => Trigger::TimeLimit,
                    (Trigger::Preemption, Cause::Cancelled) => Trigger::ExitRequest,
                    (Trigger::Preemption, Cause::Signal) => Trigger::Signal,
                    (Trigger::TimeLimit, Cause::Grace) => Trigger::Preemption,
                    _ => ordered,
                };
                assert_eq!(
                    trigger(ordered, Some(cause)),
                    expected,
                    "{ordered} {cause:?}"
                );
            }
        }
    }

    #[test]
    fn a_run_gets_on_if_it_has_saved_what_it_computed() {
        for (cpu, computed) in [
            (Some(Duration::ZERO), false),
            (Some(Duration::from_nanos(9_999_999)), false),
            (Some(Duration::from_millis(10)), true),
            (Some(Duration::from_secs(3600)), true),
            (None, true),
        ] {
            assert!(!has_progressed(false, cpu));
            assert_eq!(has_progressed(true, cpu), computed, "{cpu:?}");
        }
    }

    #[test]
    fn runs_without_progress_are_counted_in_a_row() {
        let begun = |job, run, without_progress, held| {
            Some(BegunRun {
                job,
                run,
                without_progress,
                held,
            })
        };
        let me = (7, 5);
        for (last, progressed, expected, why) in [
            (None, None, 0, "the first run"),
            (None, Some((7, 4)), 0, "no record"),
            (begun(7, 4, 0, false), None, 1, "one"),
            (begun(7, 4, 2, false), None, 3, "one more"),
            (begun(7, 4, 2, false), Some((7, 4)), 0, "it got on"),
            (
                begun(7, 4, 2, false),
                Some((7, 3)),
                3,
                "an earlier one got on",
            ),
            (begun(7, 4, 2, false), Some((6, 4)), 3, "another job got on"),
            (
                begun(7, 2, 2, false),
                None,
                3,
                "runs 3 and 4 started nothing",
            ),
            (begun(7, 2, 2, false), Some((7, 2)), 0, "and 2 got on"),
            (
                begun(7, 5, 2, false),
                Some((7, 5)),
                2,
                "a sibling of this run",
            ),
            (begun(7, 5, 2, false), None, 2, "a sibling of this run"),
            (begun(7, 4, 3, true), None, 0, "released"),
            (begun(6, 4, 9, false), None, 0, "another job"),
            (
                begun(7, 6, 9, false),
                None,
                0,
                "from the future: job ids were reset",
            ),
            (begun(7, 4, u32::MAX, false), None, u32::MAX, "no overflow"),
        ] {
            let progressed = progressed.map(|(job, run)| ProgressedRun { job, run });
            assert_eq!(
                runs_without_progress(last, progressed, me),
                expected,
                "{why}"
            );
        }
    }

    #[test]
    fn enough_is_enough() {
        for runs in 0..10 {
            assert!(!is_stuck(runs, 0));
            assert_eq!(is_stuck(runs, 3), runs >= 3);
        }
    }

    #[test]
    fn the_notice_is_what_is_left_when_this_helper_hears_of_the_end() {
        let site = |grace_time, preemptible| Notice {
            kill_wait: Duration::from_secs(30),
            grace_time: Duration::from_secs(grace_time),
            preemptible,
        };
        for (grace, preemptible, batch, expected) in [
            (0, true, false, 30),
            (0, true, true, 30),
            (120, true, false, 150),
            (120, true, true, 85),
            (20, true, true, 30),
            (120, false, false, 30),
            (120, false, true, 30),
        ] {
            let got = notice(&site(grace, preemptible), batch);
            assert_eq!(
                got,
                Duration::from_secs(expected),
                "{grace} {preemptible} {batch}"
            );
        }
    }

    #[test]
    fn what_was_measured_counts_for_the_time_to_save() {
        let last = Some(Cost {
            bytes: 1 << 30,
            took: Duration::from_secs(4),
        });
        assert_eq!(time_to_save(1 << 30, last, 1.5), Duration::from_secs(6));
        assert_eq!(time_to_save(0, last, 1.5), Duration::from_secs(6));
        assert_eq!(time_to_save(4 << 30, last, 1.5), Duration::from_secs(24));
        assert_eq!(
            time_to_save(1 << 20, None, 1.5),
            lead_time(1 << 20, None, 1.5)
        );
        let nothing = Some(Cost {
            bytes: 0,
            took: Duration::from_secs(1),
        });
        assert!(time_to_save(u64::MAX, nothing, 1.0) <= Duration::from_secs(1_000_000));
    }

    #[test]
    fn a_job_leaves_a_node_that_is_to_be_empty_if_it_can_come_back() {
        for evacuation in [None, Some("1f3a9c07".to_owned())] {
            for drain in [true, false] {
                for on_drain in [true, false] {
                    for can_requeue in [true, false] {
                        let outlook = Outlook {
                            evacuation: evacuation.clone(),
                            drain,
                            can_requeue,
                            ..Outlook::default()
                        };
                        let expected = match (&evacuation, drain && on_drain, can_requeue) {
                            (None, false, _) => Leaving::Stay,
                            (_, _, true) => Leaving::Leave,
                            (_, _, false) => Leaving::Save,
                        };
                        assert_eq!(leaving(&outlook, on_drain), expected, "{outlook:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_earliest_deadline_counts() {
        let times = [None, Some(at(100)), Some(at(200))];
        for end in times {
            for reservation_end in times {
                for maintenance in times {
                    for on_maintenance in [true, false] {
                        let outlook = Outlook {
                            end,
                            reservation_end,
                            maintenance,
                            ..Outlook::default()
                        };
                        let limit = [end, reservation_end].into_iter().flatten().min();
                        let maintenance = maintenance.filter(|_| on_maintenance);
                        let expected = match (limit, maintenance) {
                            (None, None) => None,
                            (Some(limit), None) => Some((Due::TimeLimit, limit)),
                            (None, Some(start)) => Some((Due::Maintenance, start)),
                            (Some(limit), Some(start)) if limit <= start => {
                                Some((Due::TimeLimit, limit))
                            }
                            (Some(_), Some(start)) => Some((Due::Maintenance, start)),
                        };
                        let next = deadline(&outlook, on_maintenance, &[]);
                        assert_eq!(next, expected, "{outlook:?} {on_maintenance}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_deadline_that_is_done_with_gives_way_to_the_next() {
        let outlook = Outlook {
            end: Some(at(300)),
            reservation_end: Some(at(200)),
            maintenance: Some(at(100)),
            ..Outlook::default()
        };
        let mut done = Vec::new();
        for expected in [
            Some((Due::Maintenance, at(100))),
            Some((Due::TimeLimit, at(200))),
            Some((Due::TimeLimit, at(300))),
            None,
        ] {
            let next = deadline(&outlook, true, &done);
            assert_eq!(next, expected);
            done.extend(next);
        }
        let sooner = Outlook {
            end: Some(at(50)),
            ..outlook
        };
        // A pre-emption has moved the end since: that is another one.
        assert_eq!(
            deadline(&sooner, true, &done),
            Some((Due::TimeLimit, at(50)))
        );
    }

    #[test]
    fn only_a_job_that_slurm_ends_or_starts_again_stops() {
        for can_requeue in [true, false] {
            let outlook = Outlook {
                can_requeue,
                ..Outlook::default()
            };
            assert!(stops_at(Due::TimeLimit, &outlook));
            assert_eq!(stops_at(Due::Maintenance, &outlook), can_requeue);
        }
    }

    #[test]
    fn intervals_are_dalys() {
        let minutes = |minutes: f64| Duration::from_secs_f64(minutes * 60.0);
        for (mtbf, expected) in [(24.0 * 60.0, 116.7), (6.0 * 60.0, 56.7), (15.0, 9.1)] {
            let interval = daly_interval(minutes(5.0), minutes(mtbf)).as_secs_f64() / 60.0;
            assert!((interval - expected).abs() < 0.06, "{mtbf}: {interval}");
        }
        assert_eq!(daly_interval(minutes(30.0), minutes(10.0)), minutes(10.0));
    }

    #[test]
    fn what_fits_is_what_takes_so_long() {
        let bytes = fits(Duration::from_secs(30), 1.5);
        assert_eq!(lead_time(bytes, None, 1.5).as_secs(), 30);
        assert_eq!(fits(Duration::from_secs(5), 1.5), 0);
    }

    #[test]
    fn lead_time_grows_with_memory_and_learns() {
        let small = lead_time(1 << 20, None, 1.5);
        let large = lead_time(10 << 30, None, 1.5);
        assert!(small < Duration::from_secs(10) && large > Duration::from_secs(200));
        let minute = Duration::from_secs(60);
        assert_eq!(lead_time_within(large, minute), Duration::from_secs(30));
        assert_eq!(lead_time_within(small, minute), small);
        let fast = Cost {
            bytes: 1 << 30,
            took: Duration::from_secs(1),
        };
        assert!(lead_time(10 << 30, Some(fast), 1.5) < Duration::from_secs(30));
    }
}
