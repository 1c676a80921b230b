//! From the application's start to its end in this run: its signals, its time, requests, its
//! checkpoints.
//!
//! Contract: [`Watch::watch`] returns once no rank's application is left, and says how that came.
//! Every event is met where it arrives; while a checkpoint is under way none begins. `policy` says
//! when, `saving` does it beside us.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::adviser::Adviser;
use super::breaker::Breaker;
use super::comment::Comment;
use super::inquiry::Inquiry;
use super::output::Output;
use super::outside::Outside;
use super::ranks::Leader;
use super::saving::{Commit, Failure, Look, Order, Progress, Saved, Saving};
use super::start::Started;
use super::work::Work;
use super::{Computation, Fatal, Signals, node, note, reap, system};
use crate::clock::Clock;
use crate::config::{Interval, OnCancel};
use crate::container::Place;
use crate::engine::{End, Running, Then};
use crate::evacuation;
use crate::policy::{self, Cause, Cost, Due};
use crate::requests::{self, Answer, Request};
use crate::slurm;
use crate::socket::{Known, Socket};
use crate::store::{
    self, Draft, Durations, Facts, Generation, Lock, OpenFile, State, Trigger, What, durations,
};

/// How often memory and the time left are looked at.
const TICK: Duration = Duration::from_secs(20);

/// How long a commit waits for the cause of the job's end, where it decides whether anything is
/// committed. Slurm answers in milliseconds, or hardly at all.
const CAUSE_LIMIT: Duration = Duration::from_secs(5);

/// How watching an application ended.
pub enum Outcome {
    /// By itself.
    Ended(End),
    /// After it had been told to end and could not be saved.
    ToldToEnd(End),
    /// Saved, and ended at the saved state. With `alone` its job goes on without it.
    Stopped {
        trigger: Trigger,
        signal: Signal,
        alone: bool,
    },
    /// By the engine, without a saved state.
    Lost { why: String },
}

/// The same where it is only told of.
const SHORTLY: Duration = Duration::from_secs(1);

/// Why nothing is saved of a cancelled job.
const DISCARDED: &str = "the job was cancelled, and on_cancel is discard";

pub struct Watch<'a> {
    computation: &'a Computation,
    lock: &'a Lock,
    /// Of the other ranks.
    leader: &'a mut Leader,
    output: Option<&'a Arc<Output>>,
    /// Looks at what the application needs around it.
    look: Arc<Look>,
    breaker: Option<&'a mut Breaker>,
    comment: &'a Comment,
    running: Arc<dyn Running>,
    /// Readable once the application's process has ended.
    child: OwnedFd,
    commit: Arc<Commit>,
    socket: Socket,
    saving: Option<Saving>,
    /// A checkpoint that waits until the application holds none off any more.
    held: Option<(Trigger, Then)>,
    /// Set once the application has to end: why, and by which signal this process ends then.
    stop: Option<(Trigger, Signal)>,
    /// Whether the stop was asked for from within the job, which is to go on.
    alone: bool,
    /// The last checkpoint's cost.
    cost: Option<Cost>,
    clock: Clock,
    /// When the application started in this run.
    begun: Instant,
    /// The notice is too short: checkpoints in between are taken unless somebody has chosen.
    short_notice: bool,
    next_interval: Option<Instant>,
    /// The interval that the application wished when the next one was planned.
    wish: Option<Duration>,
    work: Work,
    /// CPU time of this run that the checkpoint under way is of.
    cpu: Duration,
    /// Why the job was told to end.
    inquiry: Inquiry,
    /// Whether the notice is long enough.
    adviser: Adviser,
    /// Rung by what finds something out beside us.
    bell: Arc<EventFd>,
    /// The job was cancelled and nothing is saved (config `on_cancel`).
    discarded: bool,
    stopped: bool,
    lost: Option<String>,
    /// Whether it ended before the checkpoint that it is lost with had done anything to it.
    ended_before: bool,
    /// Requests from outside of the job: not begun, and those the present checkpoint is for.
    asked: Vec<Request>,
    serving: Vec<Request>,
    /// When they were looked for last.
    looked: Instant,
}

impl<'a> Watch<'a> {
    pub fn new(
        computation: &'a Computation,
        lock: &'a Lock,
        leader: &'a mut Leader,
        output: Option<&'a Arc<Output>>,
        (breaker, comment): (Option<&'a mut Breaker>, &'a Comment),
        started: Started,
    ) -> Result<Watch<'a>, Fatal> {
        let child = crate::sys::pidfd(started.running.child()).map_err(system("pidfd_open"))?;
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let bell = Arc::new(bell.map_err(|why| system("eventfd")(why.into()))?);
        let inquiry = Inquiry::new(bell.clone());
        let before = started
            .from
            .as_ref()
            .and_then(|from| from.manifest().computed);
        let mut watch = Watch {
            computation,
            lock,
            leader,
            output,
            breaker,
            comment,
            child,
            commit: commit(computation, &started, inquiry.clone(), output.cloned()),
            look: look(computation, started.running.child(), output.cloned()),
            socket: started.socket,
            saving: None,
            held: None,
            stop: None,
            alone: false,
            cost: started.from.as_ref().and_then(cost).or_else(|| {
                // Of an earlier computation of this name, as a rule the same program.
                let newest = *computation.cell.numbers().ok()?.last()?;
                cost(&computation.cell.generation(newest).ok()?)
            }),
            clock: Clock::of(
                computation.job.as_ref(),
                computation.name.dir(),
                &computation.config,
            )
            .map_err(system("watching the time"))?,
            begun: Instant::now(),
            short_notice: false,
            next_interval: None,
            wish: None,
            work: Work::begin(&started.running.processes(), before.unwrap_or_default()),
            cpu: Duration::ZERO,
            inquiry,
            adviser: Adviser::of(computation.job.as_ref(), &computation.name, &bell),
            bell,
            discarded: false,
            stopped: false,
            lost: None,
            ended_before: false,
            // Whoever asked while the application was being started is not kept waiting.
            asked: requests::take(&computation.cell),
            serving: Vec::new(),
            looked: Instant::now(),
            running: started.running,
        };
        watch.plan_interval();
        Ok(watch)
    }

    pub fn watch(&mut self, signals: &mut Signals) -> std::io::Result<Outcome> {
        let mut ended = false;
        loop {
            if ended && self.saving.is_none() && self.all_ended() {
                return self.outcome();
            }
            ended |= self.wait(signals, ended)?;
            while let Some(signal) = signals.next()? {
                self.on_signal(signal)?;
            }
            while let Some(progress) = self.saving.as_ref().and_then(Saving::progress) {
                self.on_progress(progress)?;
            }
            if self.running.wish() != self.wish && self.saving.is_none() {
                self.plan_interval();
            }
            self.on_cancel();
            self.clock.heard();
            self.socket.serve(Known {
                time_left: self.clock.left(),
                waiting: self.held.is_some() || (self.stop.is_some() && self.saving.is_some()),
            });
            // Nothing is saved while the job is suspended: its time stands still.
            self.on_time(ended || signals.suspended())?;
        }
    }

    /// Waits for an event. Says whether the application's process has ended.
    fn wait(&self, signals: &Signals, ended: bool) -> std::io::Result<bool> {
        let mut fds = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.bell.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(saving) = &self.saving {
            fds.push(PollFd::new(saving.as_fd(), PollFlags::POLLIN));
        }
        if let Some(news) = self.clock.fd() {
            fds.push(PollFd::new(news, PollFlags::POLLIN));
        }
        if let Some(socket) = self.socket.fd() {
            fds.push(PollFd::new(socket, PollFlags::POLLIN));
        }
        if let Some(wishes) = self.running.wishes() {
            fds.push(PollFd::new(wishes, PollFlags::POLLIN));
        }
        if !ended {
            fds.push(PollFd::new(self.child.as_fd(), PollFlags::POLLIN));
        }
        let mut wake = Instant::now() + TICK;
        if ended {
            // Other ranks still run: nothing but a look tells when they end.
            wake = Instant::now() + self.leader.look();
        }
        // While a checkpoint is under way, none begins: its end is waited for.
        if !ended && self.saving.is_none() {
            let released = self.held.and_then(|_| self.socket.held_until());
            let times = [
                self.next_interval,
                self.lead_instant().map(|(_, lead)| lead),
                self.socket.due(),
                released,
            ];
            wake = times.into_iter().flatten().fold(wake, Instant::min);
        }
        match nix::poll::poll(&mut fds, crate::sys::until(Some(wake))) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(why) => return Err(why.into()),
        }
        // Only the waking counts.
        let _ = self.bell.read();
        Ok(!ended && fds.last().and_then(PollFd::any).unwrap_or(false))
    }

    fn on_signal(&mut self, signal: Signal) -> std::io::Result<()> {
        if Some(signal) == self.computation.signal {
            if signal == Signal::SIGURG {
                // It may mean a node that is to be emptied as well.
                self.clock.look();
            }
            return self.save(Trigger::Signal, Then::Continue);
        }
        match signal {
            Signal::SIGTERM => {
                if self
                    .stop
                    .is_some_and(|(trigger, _)| trigger == Trigger::Preemption)
                {
                    // Slurm says it twice at a time limit and after a grace time.
                    return Ok(());
                }
                self.stop = Some((Trigger::Preemption, Signal::SIGTERM));
                if let Some(job) = &self.computation.job {
                    self.inquiry.begin(job, self.lock);
                }
                self.save(Trigger::Preemption, Then::Stop)
            }
            // DMTCP takes its own checkpoint at SIGUSR2, which nobody would commit.
            Signal::SIGUSR2 => {
                log::debug!("SIGUSR2 is not passed on");
                Ok(())
            }
            Signal::SIGURG => {
                if !self.look_for_requests() {
                    // Of another helper of the job, which knows more, of an operator who empties a node,
                    // or the application's own.
                    self.clock.look();
                    self.running.signal(Signal::SIGURG);
                }
                Ok(())
            }
            other => {
                self.running.signal(other);
                Ok(())
            }
        }
    }

    /// Takes new requests from outside of the job; whether there are any.
    fn look_for_requests(&mut self) -> bool {
        self.looked = Instant::now();
        let known = self.serving.iter().chain(&self.asked);
        let known: Vec<String> = known.map(|request| request.id.clone()).collect();
        let mut new = requests::take(&self.computation.cell);
        new.retain(|request| !known.contains(&request.id));
        let any = !new.is_empty();
        self.asked.append(&mut new);
        any
    }

    /// Says what became of the requests that a checkpoint was for.
    fn answer(&mut self, answer: &Answer) {
        for request in self.serving.drain(..) {
            requests::answer(&self.computation.cell, &request, answer);
        }
    }

    fn on_time(&mut self, ended: bool) -> std::io::Result<()> {
        if ended {
            return Ok(());
        }
        let now = Instant::now();
        // Slurm signals a batch script, not what the script has started.
        if self.looked.elapsed() >= TICK {
            self.look_for_requests();
        }
        if let Some((trigger, then)) = self.held
            && self.socket.held_until().is_none()
        {
            return self.save(trigger, then);
        }
        if let Some((due, _)) = self.lead_instant().filter(|(_, lead)| *lead <= now) {
            let leave = self.clock.stops_at(due);
            if leave || self.saving.is_none() {
                return self.on_deadline(due, leave);
            }
        }
        if self.stop.is_none()
            && self.saving.is_none()
            && let Some(drained) = self.clock.drained()
        {
            log::info!("{}: a node of the job is drained", self.computation.title);
            return self.save_for(Trigger::Drain, drained.leave);
        }
        if self.stop.is_none() && self.next_interval.is_some_and(|next| next <= now) {
            self.next_interval = None;
            return self.save(Trigger::Interval, Then::Continue);
        }
        if self.stop.is_none() && self.saving.is_none() && !self.asked.is_empty() {
            let Some(stop) = self.asked.iter().find(|request| request.stop) else {
                return self.save(Trigger::Request, Then::Continue);
            };
            let trigger = stop.trigger.unwrap_or(Trigger::ExitRequest);
            self.stop = Some((trigger, Signal::SIGTERM));
            self.alone = self.is_asked_from_within();
            return self.save(trigger, Then::Stop);
        }
        if self.saving.is_none() && self.socket.due().is_some_and(|due| due <= now) {
            return self.save(Trigger::Request, Then::Continue);
        }
        if self.stop.is_none() {
            self.advise();
        }
        Ok(())
    }

    /// Whether everybody who asks for the end is a part of this job. A batch script that is the
    /// application itself has nothing that could go on.
    fn is_asked_from_within(&self) -> bool {
        let job = self.computation.job.as_ref().map(|job| job.id);
        let mut stops = self.asked.iter().filter(|request| request.stop);
        self.computation.script.is_none()
            && job.is_some()
            && stops.all(|request| request.within == job)
    }

    /// Tells once that Slurm would not leave enough time, and switches on checkpoints in between.
    fn advise(&mut self) {
        let config = &self.computation.config;
        let memory = || self.running.memory();
        let Some(short) = self.adviser.look(memory, self.cost, config.safety) else {
            return;
        };
        let title = &self.computation.title;
        match self.interval() {
            None => {
                self.short_notice = true;
                self.plan_interval();
                let next = self.next_interval.map_or(0, |next| {
                    next.saturating_duration_since(Instant::now()).as_secs()
                });
                log::warn!(
                    "{title}: {short}. So it is saved while it runs, every {} s for now \
                     (--container-checkpoint-interval=DURATION chooses, =off does not)",
                    next.max(1)
                );
            }
            Some(Interval::Off) => log::warn!(
                "{title}: {short}. Checkpoints while it runs are switched off: what it computed \
                 would be lost (--container-checkpoint-interval=auto)"
            ),
            Some(Interval::Auto | Interval::Every(_)) => log::warn!(
                "{title}: {short}. Then it goes on from the last checkpoint taken while it ran"
            ),
        }
    }

    /// Ends the application unsaved if its job turned out to be cancelled, where that is wanted.
    fn on_cancel(&mut self) {
        let wanted = self.computation.config.on_cancel == OnCancel::Discard;
        if !wanted
            || self.discarded
            || self.stopped
            || self.stop.is_none()
            || !self.inquiry.known().is_some_and(policy::discards)
        {
            return;
        }
        self.discarded = true;
        log::info!(
            "{}: the job was cancelled: nothing more is saved, earlier generations stay",
            self.computation.title
        );
        self.running.kill();
        if self.saving.is_none() {
            self.settle_discarded();
        }
    }

    fn settle_discarded(&mut self) {
        let what = What::CheckpointRefused {
            trigger: Trigger::ExitRequest,
            reason: DISCARDED.into(),
        };
        note(self.lock, what);
        self.answer(&Answer::Failed {
            why: DISCARDED.into(),
        });
        self.stopped = true;
        self.leader.stopped();
    }

    fn on_deadline(&mut self, due: Due, leave: bool) -> std::io::Result<()> {
        let title = &self.computation.title;
        let trigger = match due {
            Due::TimeLimit if self.clock.preempted() => {
                log::info!("{title}: the job is being pre-empted");
                self.inquiry.found(Cause::Grace);
                Trigger::TimeLimit
            }
            Due::TimeLimit => {
                log::info!("{title}: the job's time limit is near");
                Trigger::TimeLimit
            }
            Due::Maintenance => {
                log::info!("{title}: maintenance is about to begin on a node of the job");
                Trigger::Maintenance
            }
        };
        if !leave {
            // It is saved once, and runs on.
            self.clock.give_up();
        }
        self.save_for(trigger, leave)
    }

    /// Saves the application, and ends it if the job is to leave.
    fn save_for(&mut self, trigger: Trigger, leave: bool) -> std::io::Result<()> {
        if !leave {
            return self.save(trigger, Then::Continue);
        }
        self.stop = Some((trigger, Signal::SIGTERM));
        self.save(trigger, Then::Stop)
    }

    /// When a checkpoint has to start to be done by the next deadline, and which that is.
    fn lead_instant(&self) -> Option<(Due, Instant)> {
        if self.stop.is_some() {
            return None;
        }
        let (due, end) = self.clock.deadline()?;
        let config = &self.computation.config;
        let lead = config
            .lead_time
            .unwrap_or_else(|| policy::lead_time(self.running.memory(), self.cost, config.safety));
        // A hold that is in force may last to its end.
        let held = self.socket.held_until().map_or(Duration::ZERO, |end| {
            end.saturating_duration_since(Instant::now())
        });
        let run = end.saturating_duration_since(self.begun);
        let lead = policy::lead_time_within(lead + held, run);
        Some((due, end.checked_sub(lead).unwrap_or_else(Instant::now)))
    }

    /// What the user says counts, then what the application wishes, then what the admin says.
    fn interval(&self) -> Option<Interval> {
        self.computation
            .interval
            .or(self.wish.map(Interval::Every))
            .or(self.computation.config.interval)
    }

    fn plan_interval(&mut self) {
        self.wish = self.running.wish();
        let switched_on = self.short_notice.then_some(Interval::Auto);
        self.next_interval = match self.interval().or(switched_on) {
            None | Some(Interval::Off) => None,
            Some(Interval::Every(interval)) => Some(Instant::now() + interval),
            Some(Interval::Auto) => {
                let cost = policy::predicted_duration(self.running.memory(), self.cost);
                Some(Instant::now() + policy::daly_interval(cost, self.computation.config.mtbf))
            }
        };
    }

    fn save(&mut self, trigger: Trigger, then: Then) -> std::io::Result<()> {
        if self.saving.is_some() {
            // A stop that comes while the application is saved is met when that is done.
            log::debug!("a checkpoint is under way");
            return Ok(());
        }
        if then == Then::Stop
            && let Err(why) = self.lock.set_state(State::Saving)
        {
            log::warn!("{why}");
        }
        if let Some(end) = self.socket.held_until() {
            if self.held.is_none_or(|(_, held)| held == Then::Continue) {
                log::info!(
                    "{}: the application holds checkpoints off, for {} s at most ({trigger})",
                    self.computation.title,
                    end.saturating_duration_since(Instant::now()).as_secs() + 1
                );
                self.held = Some((trigger, then));
            }
            return Ok(());
        }
        self.held = None;
        if then == Then::Stop {
            self.leader.stopping();
        }
        self.serving.append(&mut self.asked);
        self.socket.begin();
        let (computed, cpu) = self.work.pause(&self.running.processes());
        self.cpu = cpu;
        if let Some(streams) = &self.computation.streams {
            streams.hold();
        }
        let order = Order {
            trigger,
            then,
            limit: self.computation.config.checkpoint_timeout,
            predicted: self.running.memory(),
            computed,
        };
        self.saving = Some(Saving::start(
            order,
            self.running.clone(),
            self.lock.clone(),
            self.commit.clone(),
            self.look.clone(),
        )?);
        Ok(())
    }

    fn on_progress(&mut self, progress: Progress) -> std::io::Result<()> {
        match progress {
            Progress::GoesOn => self.socket.reopen(),
            Progress::Over(result) => {
                if let Some(Saving { order, .. }) = self.saving.take() {
                    return self.on_result(order, result);
                }
            }
        }
        Ok(())
    }

    fn on_result(&mut self, order: Order, result: Result<Saved, Failure>) -> std::io::Result<()> {
        let title = &self.computation.title;
        self.work.go_on(&self.running.processes());
        match result {
            Ok(Saved {
                generation,
                bytes,
                trigger,
                took,
            }) => {
                log::info!(
                    "{title}: generation {generation} saved ({}, {:.1} s, {})",
                    size(bytes),
                    took.as_secs_f64(),
                    trigger
                );
                self.cost = Some(Cost { bytes, took });
                self.adviser.measured();
                self.comment.saved(title, generation, bytes, took);
                if let Some(breaker) = &mut self.breaker {
                    // Other ranks' processes are not below this one.
                    breaker.saved((self.computation.ranks.count == 1).then_some(self.cpu));
                }
                self.socket.finish(Ok(generation));
                self.answer(&Answer::Saved { generation, bytes });
                self.stopped = order.then == Then::Stop;
                if order.trigger == Trigger::Drain {
                    self.answer_evacuation(generation);
                }
                if self.stopped {
                    self.leader.stopped();
                    self.output
                        .iter()
                        .for_each(|output| output.stopped(generation));
                } else {
                    self.output.iter().for_each(|output| output.keep());
                }
            }
            // What came of killing it.
            Err(_) if self.discarded => {}
            Err(failure @ (Failure::Ended(_) | Failure::Lost(_))) => {
                self.ended_before = matches!(failure, Failure::Ended(_));
                let why = failure.to_string();
                log::error!("{title}: the checkpoint failed and the application with it: {why}");
                note(self.lock, failed(order.trigger, &why, true));
                self.answer(&Answer::Failed { why: why.clone() });
                self.running.kill();
                self.lost = Some(why);
                return Ok(());
            }
            Err(Failure::Alive(why)) => {
                log::error!("{title}: the checkpoint failed, the application runs on: {why}");
                note(self.lock, failed(order.trigger, &why, false));
                if order.trigger == Trigger::Drain {
                    self.clock.stays(&why);
                }
                self.socket.finish(Err(&why));
                self.answer(&Answer::Failed { why: why.clone() });
                self.socket.reopen();
                if order.then == Then::Stop {
                    self.leader.running();
                    self.not_saved(order.trigger);
                }
            }
        }
        if let Some(streams) = &self.computation.streams {
            streams.release();
        }
        if self.discarded {
            self.settle_discarded();
            return Ok(());
        }
        self.plan_interval();
        // A stop that was asked for while a checkpoint was under way.
        match self.stop {
            Some((trigger, _)) if order.then == Then::Continue => self.save(trigger, Then::Stop),
            _ => Ok(()),
        }
    }

    /// The application was saved because a node is emptied.
    fn answer_evacuation(&self, generation: u64) {
        if !self.stopped {
            let stays =
                format!("it is saved as generation {generation}, but Slurm cannot requeue it");
            return self.clock.stays(&stays);
        }
        // Said before the job is requeued: then this process may be killed at any moment.
        if let (Some(number), Some(job)) = (self.clock.evacuation(), &self.computation.job)
            && let Err(why) = slurm::answer(&job.target, Some((number, &evacuation::Answer::Saved)))
        {
            log::debug!("whoever empties the node is not told: {why}");
        }
    }

    /// The application has to end and could not be saved: it hears what Slurm said, as without us.
    fn not_saved(&mut self, trigger: Trigger) {
        match trigger {
            Trigger::Preemption => {
                if self.inquiry.wait(SHORTLY) == Some(Cause::Grace) {
                    log::warn!(
                        "{}: if it ends now, in its grace time, Slurm before 24.05 takes the job for \
                         completed; newer ones requeue it, and hold it at the MaxBatchRequeue-th time",
                        self.computation.title
                    );
                }
                self.running.signal(Signal::SIGTERM);
            }
            // Nothing but a person wanted it to end, who has been answered.
            Trigger::ExitRequest | Trigger::Drain => self.stop = None,
            Trigger::Maintenance => {
                self.clock.give_up();
                self.stop = None;
            }
            // Slurm has not asked yet: the application may use the time that is left.
            _ => self.clock.give_up(),
        }
        if let Err(why) = self.lock.set_state(State::Running) {
            log::warn!("{why}");
        }
    }

    /// Whether no rank's application is left: the engine's coordinator is ours, and it has to stay
    /// as long as any other rank's runs.
    fn all_ended(&self) -> bool {
        self.stopped || self.lost.is_some() || self.leader.others_ended()
    }

    fn outcome(&mut self) -> std::io::Result<Outcome> {
        let status = reap(self.running.as_ref())?;
        let end = self.running.ended(status);
        log::debug!("the application's process ended: {status:?}, {end:?}");
        // One that held its checkpoint off and ended meanwhile did not know of it.
        let told = self.stop.filter(|_| self.held.is_none());
        // The checkpoint has failed, and nothing else has.
        if self.ended_before {
            log::info!(
                "{}: it had ended by itself before it could be saved",
                self.computation.title
            );
            return Ok(Outcome::Ended(end));
        }
        let lost = self.lost.take().or_else(|| self.running.lost(status));
        Ok(match (self.stopped, lost, told) {
            (true, _, Some((trigger, signal))) | (false, Some(_), Some((trigger, signal))) => {
                Outcome::Stopped {
                    trigger,
                    signal,
                    alone: self.alone && trigger == Trigger::ExitRequest,
                }
            }
            (true, _, None) => Outcome::Stopped {
                trigger: Trigger::ExitRequest,
                signal: Signal::SIGTERM,
                alone: false,
            },
            (false, Some(why), None) => Outcome::Lost { why },
            (false, None, Some((Trigger::Preemption, _))) => Outcome::ToldToEnd(end),
            (false, None, _) => Outcome::Ended(end),
        })
    }
}

/// How a draft becomes a generation of this computation.
fn commit(
    computation: &Computation,
    started: &Started,
    inquiry: Inquiry,
    output: Option<Arc<Output>>,
) -> Arc<Commit> {
    let (kernel, cpu_flags) = node();
    let facts = Facts {
        trigger: Trigger::Request,
        predecessor: started.from.as_ref().map(Generation::number),
        ranks: computation.ranks.count,
        engine: started.engine.kind(),
        engine_version: started.engine.version().to_owned(),
        placement: started.engine.placement(),
        kernel,
        cpu_flags,
        image: computation.image.clone(),
        command: computation.command.clone(),
        durations: Durations::default(),
        truncate: Vec::new(),
        computed: None,
        needs: Vec::new(),
        listens: Vec::new(),
        streams: Vec::new(),
    };
    let discard = computation.config.on_cancel == OnCancel::Discard;
    let keep = computation.config.keep as usize;
    let last = AtomicU64::new(facts.predecessor.unwrap_or(0));
    let engine = started.engine.clone();
    let work = computation.cell.dir().join("work");
    let streams = computation.streams.clone();
    Arc::new(
        move |draft: Draft, order: Order, mut durations: Durations, outside: Outside| {
            let predecessor = Some(last.load(Ordering::SeqCst)).filter(|number| *number > 0);
            let begun = Instant::now();
            let mut truncate = Vec::new();
            Leader::keep_ends(&work, draft.dir(), facts.ranks)
                .map_err(|why| format!("cannot keep the ends of ranks: {why}"))?;
            for rank in 0..facts.ranks {
                let written = engine.written(&draft.dir().join(format!("rank-{rank}")))?;
                truncate.extend(written.into_iter().map(|(path, size)| OpenFile {
                    path: store::escape(path.as_os_str()),
                    size,
                }));
            }
            if truncate.is_empty() {
                truncate = outside.writes;
            }
            durations.note(durations::OPEN_FILES, begun.elapsed());
            let cause = match order.then {
                Then::Stop if discard => inquiry.wait(CAUSE_LIMIT),
                Then::Stop => inquiry.known(),
                Then::Continue => None,
            };
            if discard && cause.is_some_and(policy::discards) {
                return Err(DISCARDED.into());
            }
            let facts = Facts {
                trigger: policy::trigger(order.trigger, cause),
                predecessor,
                durations,
                truncate,
                computed: Some(order.computed),
                needs: outside.needs,
                listens: outside.listens,
                streams: outside.output,
                ..facts.clone()
            };
            // A node that is lost right after the commit must not take along what was written before.
            output.iter().for_each(|output| output.keep());
            if let Some(streams) = &streams {
                let noted = streams.saved(draft.number());
                noted.map_err(|why| format!("its standard streams cannot be kept: {why}"))?;
            }
            let generation = draft.commit(facts, keep).map_err(|why| why.to_string())?;
            last.store(generation.number(), Ordering::SeqCst);
            Ok(generation)
        },
    )
}

/// How what the application needs around it is looked at.
fn look(computation: &Computation, child: Pid, output: Option<Arc<Output>>) -> Arc<Look> {
    let mut own = vec![computation.cell.dir().to_path_buf()];
    if let Place::Apptainer(apptainer) = &computation.place {
        own.push(apptainer.image.clone());
    }
    let streams = computation.streams.clone();
    Arc::new(move || {
        streams.iter().for_each(|streams| streams.rest());
        Outside {
            output: output.iter().flat_map(|output| output.ends()).collect(),
            ..Outside::look(child, &own)
        }
    })
}

/// What a generation cost, as its manifest says.
pub fn cost(generation: &Generation) -> Option<Cost> {
    let manifest = generation.manifest();
    Some(Cost {
        bytes: manifest.bytes,
        took: manifest.durations.sum(),
    })
}

fn failed(trigger: Trigger, why: &str, lost: bool) -> What {
    What::CheckpointFailed {
        trigger,
        reason: why.to_owned(),
        lost,
    }
}

/// A size for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..=999_999 => format!("{:.0} kB", bytes as f64 / 1e3),
        1_000_000..=999_999_999 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
