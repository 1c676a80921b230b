//! The commands of a shell script, as far as their words are certain before it runs.
//!
//! Contract: [`commands`] knows the part of the grammar that sh, dash, ksh and bash share, and expands
//! nothing. What it tells of a word, of where a command is and of how often it runs is so, or it tells
//! nothing: a word that a shell would make into something else has no text, and the script from the
//! first thing on that is not understood is left out. Nothing here runs anything or looks at a file;
//! any bytes end in time that their number bounds.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// How deep quotes and substitutions within each other are followed.
const DEPTH_MAX: usize = 32;

/// Variables that Slurm sets to one number or word in every job that has them.
const OF_SLURM: &[&[u8]] = &[
    b"SLURM_ARRAY_JOB_ID",
    b"SLURM_ARRAY_TASK_ID",
    b"SLURM_CPUS_PER_TASK",
    b"SLURM_JOBID",
    b"SLURM_JOB_ID",
    b"SLURM_JOB_NUM_NODES",
    b"SLURM_NNODES",
    b"SLURM_NTASKS",
    b"SLURM_NTASKS_PER_NODE",
];

/// Most commands that are read.
const COMMANDS_MAX: usize = 10_000;

/// A word of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// What is certain of it: all, or its beginning.
    start: Vec<u8>,
    rest: Rest,
    /// Nothing of it was quoted.
    bare: bool,
    /// The variable whose value it is.
    variable: Option<String>,
}

/// What a word has behind its certain beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    Nothing,
    /// Something, and it stays one word.
    OneWord,
    /// Something that may become any number of words, or none.
    AnyWords,
}

impl Word {
    /// What the shell makes of it, if that is certain.
    pub fn text(&self) -> Option<OsString> {
        (self.rest == Rest::Nothing).then(|| OsString::from_vec(self.start.clone()))
    }

    /// How it begins, as far as that is certain.
    pub fn start(&self) -> &[u8] {
        &self.start
    }

    /// Whether it becomes exactly one word, whatever that is.
    pub fn is_one(&self) -> bool {
        self.rest != Rest::AnyWords
    }

    /// The variable whose value it is, and nothing else: `$A`, `"${A}"`.
    pub fn variable(&self) -> Option<&str> {
        self.variable.as_deref()
    }

    /// The name of the variable if it is an assignment (before a command, or of `export`).
    pub fn assigned(&self) -> Option<&str> {
        let at = self.start.iter().position(|byte| *byte == b'=')?;
        let name = std::str::from_utf8(&self.start[..at]).ok()?;
        let name = name.strip_suffix('+').unwrap_or(name);
        let first = name.bytes().next()?;
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        (!first.is_ascii_digit() && name.bytes().all(is_name)).then_some(name)
    }

    /// The text of a word that may be one of the grammar's own.
    fn reserved(&self) -> Option<&[u8]> {
        (self.bare && self.rest == Rest::Nothing).then_some(&self.start)
    }
}

/// How often a command is run, if those before it do what they should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Runs {
    /// It stands behind a condition, or in a function.
    Perhaps,
    /// In a loop over words, of which there should be some.
    Repeatedly,
    Once,
}

/// A command with its arguments, redirections left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// The line on which it begins, from 1.
    pub line: usize,
    pub words: Vec<Word>,
    pub runs: Runs,
    /// Whether it runs in the script's shell itself and changes that: in no pipe, not in the background,
    /// and within nothing else.
    pub in_shell: bool,
    /// The scripts that run inside it, of `$(…)` and backticks.
    pub inside: Vec<Vec<u8>>,
    /// Whether other commands run inside it, of which nothing is told.
    pub opaque: bool,
    /// Whether it writes into a file by a redirection.
    pub writes: bool,
    /// Whether it begins a function of this name; it has no words then.
    pub function: Option<OsString>,
}

/// The commands of `script`, in its order, and whether that is all of it.
pub fn commands(script: &[u8]) -> (Vec<Command>, bool) {
    // A shell would take a carriage return for a part of a word.
    let end = script.iter().position(|byte| matches!(byte, b'\r' | 0));
    let mut reader = Reader {
        script: &script[..end.unwrap_or(script.len())],
        cut: end.is_some(),
        at: 0,
        line: 1,
        open: Vec::new(),
        documents: Vec::new(),
        conditional: false,
        command: Command::at(1),
        mode: Mode::Command,
        piped: false,
        found: Vec::new(),
    };
    // What was read before is certain all the same.
    let whole = reader.read().is_ok() && reader.open.is_empty();
    (reader.found, whole)
}

/// Something that is not understood.
struct Unclear;

type Result<T> = std::result::Result<T, Unclear>;

/// What is open around a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    If,
    While,
    For,
    Group,
    Function,
    Subshell,
}

/// What the next word is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// The first of a command, or a word of the grammar.
    Command,
    /// A further one.
    Argument,
    /// One of a `for`, which is no command.
    List,
    /// Behind `fi`, `done`, `}` or `)`: there are redirections only.
    Closed,
}

/// `<<END`, whose lines come later.
struct Document {
    end: Vec<u8>,
    tabs: bool,
    plain: bool,
}

struct Reader<'a> {
    script: &'a [u8],
    /// Whether that is not all of it.
    cut: bool,
    at: usize,
    line: usize,
    /// What is open, and whether that is run on a condition only.
    open: Vec<(Open, bool)>,
    documents: Vec<Document>,
    /// Whether the command is run on a condition only (`&&`, `||`).
    conditional: bool,
    command: Command,
    mode: Mode,
    /// Whether the command gets a pipe.
    piped: bool,
    found: Vec<Command>,
}

impl Command {
    fn at(line: usize) -> Command {
        Command {
            line,
            words: Vec::new(),
            runs: Runs::Once,
            in_shell: true,
            inside: Vec::new(),
            opaque: false,
            writes: false,
            function: None,
        }
    }
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.ahead(0)
    }

    fn ahead(&self, count: usize) -> Option<u8> {
        self.script.get(self.at + count).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        if byte == b'\n' {
            self.line += 1;
        }
        Some(byte)
    }

    /// Takes `text` if it is next. Not for line ends.
    fn take(&mut self, text: &[u8]) -> bool {
        let is_next = self.script[self.at..].starts_with(text);
        if is_next {
            self.at += text.len();
        }
        is_next
    }

    fn blanks(&mut self) {
        loop {
            match (self.peek(), self.ahead(1)) {
                (Some(b' ' | b'\t'), _) => self.at += 1,
                (Some(b'\\'), Some(b'\n')) => {
                    self.at += 1;
                    self.next();
                }
                _ => return,
            }
        }
    }

    fn comment(&mut self) {
        while self.peek().is_some_and(|byte| byte != b'\n') {
            self.at += 1;
        }
    }

    // --------------------------------------------------------------- commands

    fn read(&mut self) -> Result<()> {
        loop {
            self.blanks();
            let Some(byte) = self.peek() else {
                if self.cut || !self.documents.is_empty() {
                    return Err(Unclear);
                }
                return self.end(false, false);
            };
            match byte {
                b'#' => self.comment(),
                b'\n' => {
                    self.next();
                    self.documents()?;
                    // Behind a pipe or `&&` it goes on.
                    let goes_on = self.mode == Mode::Command && self.command.words.is_empty();
                    self.end(goes_on && self.piped, goes_on && self.conditional)?;
                }
                b';' => {
                    self.at += 1;
                    if matches!(self.peek(), Some(b';' | b'&')) {
                        return Err(Unclear);
                    }
                    self.end(false, false)?;
                }
                b'&' if self.take(b"&&") => self.end(false, true)?,
                b'&' if self.ahead(1) == Some(b'>') => self.redirection()?,
                b'&' => {
                    self.at += 1;
                    self.command.in_shell = false;
                    self.end(false, false)?;
                }
                b'|' if self.take(b"||") => self.end(false, true)?,
                b'|' => {
                    self.at += 1;
                    self.take(b"&");
                    self.command.in_shell = false;
                    let conditional = self.conditional;
                    self.end(true, conditional)?;
                }
                b'(' => self.parenthesis()?,
                b')' => {
                    self.at += 1;
                    self.end(false, false)?;
                    self.close(Open::Subshell)?;
                }
                b'<' | b'>' if self.ahead(1) == Some(b'(') => {
                    let word = self.word()?;
                    self.add(word)?;
                }
                b'<' | b'>' => self.redirection()?,
                b'0'..=b'9' if self.is_number_of_redirection() => {
                    while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
                        self.at += 1;
                    }
                    self.redirection()?;
                }
                _ => {
                    let line = self.line;
                    let word = self.word()?;
                    if self.command.words.is_empty() {
                        self.command.line = line;
                    }
                    self.add(word)?;
                }
            }
        }
    }

    fn is_number_of_redirection(&self) -> bool {
        let rest = &self.script[self.at..];
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        matches!(rest.get(digits), Some(b'<' | b'>'))
    }

    fn add(&mut self, word: Word) -> Result<()> {
        match self.mode {
            Mode::Closed => Err(Unclear),
            Mode::List if word.reserved() == Some(b"do") => Err(Unclear),
            Mode::List => Ok(()),
            Mode::Argument => {
                self.command.words.push(word);
                Ok(())
            }
            Mode::Command => self.first(word),
        }
    }

    /// The first word of a command, which may be one of the grammar.
    fn first(&mut self, word: Word) -> Result<()> {
        let Some(text) = word.reserved() else {
            self.mode = Mode::Argument;
            self.command.words.push(word);
            return Ok(());
        };
        match text {
            b"if" => self.open(Open::If),
            b"while" | b"until" => self.open(Open::While),
            b"{" => self.open(Open::Group),
            b"for" | b"select" => {
                self.open(Open::For)?;
                self.mode = Mode::List;
                Ok(())
            }
            b"then" | b"else" | b"elif" if self.innermost() == Some(Open::If) => Ok(()),
            b"do" if matches!(self.innermost(), Some(Open::While | Open::For)) => Ok(()),
            b"fi" => self.close(Open::If),
            b"done" => match self.innermost() {
                Some(open @ (Open::While | Open::For)) => self.close(open),
                _ => Err(Unclear),
            },
            b"case" => self.case(),
            b"}" => self.close(Open::Group),
            // What comes next tells of its failure only.
            b"!" => Ok(()),
            b"[[" => self.test(),
            b"function" => {
                self.blanks();
                let name = self.word()?.text().ok_or(Unclear)?;
                self.blanks();
                if self.take(b"(") {
                    self.blanks();
                    if !self.take(b")") {
                        return Err(Unclear);
                    }
                }
                self.function(name)
            }
            b"coproc" | b"then" | b"else" | b"elif" | b"do" | b"esac" | b"in" => Err(Unclear),
            _ => {
                self.mode = Mode::Argument;
                self.command.words.push(word);
                Ok(())
            }
        }
    }

    fn innermost(&self) -> Option<Open> {
        self.open.last().map(|(open, _)| *open)
    }

    fn open(&mut self, what: Open) -> Result<()> {
        self.open.push((what, self.conditional));
        self.conditional = false;
        Ok(())
    }

    fn close(&mut self, what: Open) -> Result<()> {
        match self.open.pop() {
            Some((open, conditional)) if open == what => self.conditional = conditional,
            _ => return Err(Unclear),
        }
        // A function ends with its body.
        if self.innermost() == Some(Open::Function) {
            self.open.pop();
        }
        self.mode = Mode::Closed;
        Ok(())
    }

    /// Passes over the rest of `case … esac`, whose patterns have parentheses of their own. All that is
    /// told of it is that something may run there.
    fn case(&mut self) -> Result<()> {
        let mut open = 1;
        while open > 0 {
            self.blanks();
            match self.peek().ok_or(Unclear)? {
                b'#' => self.comment(),
                b'\n' => {
                    self.next();
                    self.documents()?;
                }
                b'(' | b')' | b';' | b'&' | b'|' => self.at += 1,
                b'<' | b'>' if self.ahead(1) != Some(b'(') => self.redirection()?,
                _ => match self.word()?.reserved() {
                    Some(b"case") => open += 1,
                    Some(b"esac") => open -= 1,
                    _ => {}
                },
            }
        }
        self.command.opaque = true;
        self.mode = Mode::Closed;
        Ok(())
    }

    /// A function's name has been read; its body comes next.
    fn function(&mut self, name: OsString) -> Result<()> {
        let mut begins = Command::at(self.line);
        begins.function = Some(name);
        begins.runs = Runs::Perhaps;
        self.found.push(begins);
        self.command = Command::at(self.line);
        self.mode = Mode::Command;
        loop {
            self.blanks();
            match self.peek() {
                Some(b'\n') if self.documents.is_empty() => drop(self.next()),
                Some(b'#') => self.comment(),
                Some(b'{' | b'(') => break,
                _ => return Err(Unclear),
            }
        }
        self.open(Open::Function)
    }

    fn parenthesis(&mut self) -> Result<()> {
        self.at += 1;
        match (self.mode, &self.command.words[..]) {
            (Mode::Command, []) if self.peek() == Some(b'(') => {
                // `((…))`, or a subshell in one, which nobody writes so.
                self.substitution(0)?;
                self.mode = Mode::Closed;
                Ok(())
            }
            (Mode::Command, []) => self.open(Open::Subshell),
            // `for ((…))`
            (Mode::List, []) if self.peek() == Some(b'(') => self.substitution(0),
            (Mode::Argument, [name]) => {
                let name = name.text().ok_or(Unclear)?;
                self.blanks();
                match self.take(b")") {
                    true => self.function(name),
                    false => Err(Unclear),
                }
            }
            _ => Err(Unclear),
        }
    }

    /// `[[ … ]]`, in which blanks, parentheses and `<` mean something else.
    fn test(&mut self) -> Result<()> {
        loop {
            self.blanks();
            match self.peek().ok_or(Unclear)? {
                b'(' | b')' | b'<' | b'>' | b'&' | b'|' | b';' | b'\n' | b'#' => {
                    self.next();
                }
                _ => {
                    if self.word()?.reserved() == Some(b"]]") {
                        self.mode = Mode::Closed;
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Ends a command; the next one gets a pipe (`piped`) or depends on how this one ended.
    fn end(&mut self, piped: bool, conditional: bool) -> Result<()> {
        let next = Command::at(self.line);
        let mut command = std::mem::replace(&mut self.command, next);
        if !command.words.is_empty() || command.opaque || !command.inside.is_empty() {
            command.in_shell &= !self.piped && self.open.is_empty();
            let perhaps = |(open, conditional): &(Open, bool)| {
                *conditional || matches!(open, Open::If | Open::While | Open::Function)
            };
            command.runs = if self.conditional || self.open.iter().any(perhaps) {
                Runs::Perhaps
            } else if self.open.iter().any(|(open, _)| *open == Open::For) {
                Runs::Repeatedly
            } else {
                Runs::Once
            };
            self.found.push(command);
            if self.found.len() >= COMMANDS_MAX {
                return Err(Unclear);
            }
        }
        self.mode = Mode::Command;
        self.piped = piped;
        self.conditional = conditional;
        Ok(())
    }

    // --------------------------------------------------------------- redirections

    fn redirection(&mut self) -> Result<()> {
        let document = [&b"<<<"[..], b"<<-", b"<<"]
            .into_iter()
            .find(|op| self.take(op));
        match document {
            Some(b"<<<") => {
                self.blanks();
                self.word().map(drop)
            }
            Some(operator) => {
                self.blanks();
                let word = self.word()?;
                let end = word.text().ok_or(Unclear)?.into_vec();
                self.documents.push(Document {
                    end,
                    tabs: operator == b"<<-",
                    plain: !word.bare,
                });
                Ok(())
            }
            None => {
                let operators = [
                    &b"&>>"[..],
                    b"&>",
                    b">>",
                    b">&",
                    b">|",
                    b"<&",
                    b"<>",
                    b"<",
                    b">",
                ];
                let operator = operators.into_iter().find(|operator| self.take(operator));
                let operator = operator.ok_or(Unclear)?;
                self.command.writes |= operator.contains(&b'>') && operator != b">&";
                self.blanks();
                self.word().map(drop)
            }
        }
    }

    /// Passes over the lines of the documents that begin here.
    fn documents(&mut self) -> Result<()> {
        for document in std::mem::take(&mut self.documents) {
            loop {
                let start = self.at;
                self.comment();
                let line = &self.script[start..self.at];
                let line = match document.tabs {
                    true => line.trim_ascii_start(),
                    false => line,
                };
                let is_end = line == document.end;
                let runs = |at: &[u8]| at.contains(&b'`') || at.windows(2).any(|two| two == b"$(");
                if !is_end && !document.plain && runs(line) {
                    self.command.opaque = true;
                }
                // The end may be the end of the script, a line that is missing not.
                if self.next().is_none() && !is_end {
                    return Err(Unclear);
                }
                if is_end {
                    break;
                }
            }
        }
        Ok(())
    }

    // --------------------------------------------------------------- words

    fn word(&mut self) -> Result<Word> {
        let mut word = Word {
            start: Vec::new(),
            rest: Rest::Nothing,
            bare: true,
            variable: None,
        };
        let begin = self.at;
        while let Some(byte) = self.peek() {
            match byte {
                b'<' | b'>' if self.at == begin && self.ahead(1) == Some(b'(') => {
                    self.at += 2;
                    self.substitution(0)?;
                    self.command.opaque = true;
                    word.some(Rest::OneWord);
                }
                b' ' | b'\t' | b'\n' | b';' | b'&' | b'|' | b'<' | b'>' | b')' => break,
                b'(' if word.rest == Rest::Nothing && word.start.ends_with(b"=") => {
                    // An array.
                    self.at += 1;
                    self.substitution(0)?;
                    self.command.opaque = true;
                    word.some(Rest::OneWord);
                }
                // Behind a name it begins a function, else it is nothing that is known here.
                b'(' if self.at > begin => break,
                b'(' => return Err(Unclear),
                b'\'' => {
                    word.bare = false;
                    self.at += 1;
                    loop {
                        match self.next().ok_or(Unclear)? {
                            b'\'' => break,
                            byte => word.push(byte),
                        }
                    }
                }
                b'"' => {
                    word.bare = false;
                    self.at += 1;
                    self.in_quotes(&mut word, 0)?;
                }
                b'\\' => {
                    self.at += 1;
                    match self.next().ok_or(Unclear)? {
                        b'\n' => {}
                        byte => {
                            word.bare = false;
                            word.push(byte);
                        }
                    }
                }
                b'$' | b'`' => {
                    let begin = self.at;
                    if self.expansion(0)? {
                        let inside = &self.script[begin + 1..self.at];
                        let braced = inside.strip_prefix(b"{").and_then(|i| i.strip_suffix(b"}"));
                        word.some(match OF_SLURM.contains(&braced.unwrap_or(inside)) {
                            true => Rest::OneWord,
                            false => Rest::AnyWords,
                        });
                    } else {
                        word.push(b'$');
                    }
                }
                b'*' | b'?' => {
                    self.at += 1;
                    word.some(Rest::AnyWords);
                }
                b'[' | b'{' if !self.stands_alone(begin, byte) => {
                    self.at += 1;
                    word.some(Rest::AnyWords);
                }
                b'~' if self.at == begin || matches!(word.start.last(), Some(b'=' | b':')) => {
                    self.at += 1;
                    word.some(Rest::OneWord);
                }
                byte => {
                    self.next();
                    word.push(byte);
                }
            }
        }
        if word.rest != Rest::Nothing {
            word.variable = variable(&self.script[begin..self.at]);
        }
        match self.at == begin {
            true => Err(Unclear),
            false => Ok(word),
        }
    }

    /// Whether a bracket or brace is a word of its own (`[`, `[[`, `{`, `{}`), not a pattern.
    fn stands_alone(&self, begin: usize, byte: u8) -> bool {
        let rest = &self.script[begin..];
        let length = rest
            .iter()
            .take_while(|byte| !matches!(byte, b' ' | b'\t' | b'\n' | b';'))
            .count();
        match byte {
            b'[' => matches!(&rest[..length], b"[" | b"[["),
            _ => matches!(&rest[..length], b"{" | b"{}"),
        }
    }

    /// The rest of `"…"`.
    fn in_quotes(&mut self, word: &mut Word, depth: usize) -> Result<()> {
        if depth > DEPTH_MAX {
            return Err(Unclear);
        }
        loop {
            match self.peek().ok_or(Unclear)? {
                b'"' => {
                    self.at += 1;
                    return Ok(());
                }
                b'\\' => {
                    self.at += 1;
                    match self.next().ok_or(Unclear)? {
                        b'\n' => {}
                        byte @ (b'$' | b'`' | b'"' | b'\\') => word.push(byte),
                        byte => {
                            word.push(b'\\');
                            word.push(byte);
                        }
                    }
                }
                // `"$@"` and `"${array[@]}"` are any number of words.
                b'$' | b'`' => {
                    let begin = self.at;
                    match self.expansion(depth + 1)? {
                        true if self.script[begin..self.at].contains(&b'@') => {
                            word.some(Rest::AnyWords);
                        }
                        true => word.some(Rest::OneWord),
                        false => word.push(b'$'),
                    }
                }
                byte => {
                    self.next();
                    word.push(byte);
                }
            }
        }
    }

    /// Passes over an expansion that begins here; false if it is only a `$`.
    fn expansion(&mut self, depth: usize) -> Result<bool> {
        if depth > DEPTH_MAX {
            return Err(Unclear);
        }
        if self.next() == Some(b'`') {
            let begin = self.at;
            loop {
                match self.next().ok_or(Unclear)? {
                    b'`' => break,
                    b'\\' => {
                        self.command.opaque = true;
                        self.next();
                    }
                    _ => {}
                }
            }
            let inside = self.script[begin..self.at - 1].to_vec();
            self.command.inside.push(inside);
            return Ok(true);
        }
        match self.peek() {
            Some(b'(') => {
                self.at += 1;
                let begin = self.at;
                self.substitution(depth + 1)?;
                let inside = &self.script[begin..self.at - 1];
                let separates = |byte: &u8| matches!(byte, b';' | b'|' | b'&' | b'\n');
                let arithmetic = inside.starts_with(b"(")
                    && inside.ends_with(b")")
                    && !inside.iter().any(separates);
                // What runs within arithmetic was met on the way.
                if !arithmetic {
                    let inside = inside.to_vec();
                    self.command.inside.push(inside);
                }
                Ok(true)
            }
            Some(b'{') => {
                self.at += 1;
                self.braces(depth + 1)?;
                Ok(true)
            }
            Some(b'\'') if depth == 0 => {
                // `$'…'`
                self.at += 1;
                loop {
                    match self.next().ok_or(Unclear)? {
                        b'\'' => return Ok(true),
                        b'\\' => drop(self.next()),
                        _ => {}
                    }
                }
            }
            // `$"…"` is translated.
            Some(b'"') if depth == 0 => {
                self.at += 1;
                let mut word = Word::nowhere();
                self.in_quotes(&mut word, depth + 1)?;
                Ok(true)
            }
            Some(byte) if byte.is_ascii_alphabetic() || byte == b'_' => {
                let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
                while self.peek().is_some_and(is_name) {
                    self.at += 1;
                }
                Ok(true)
            }
            Some(b'0'..=b'9' | b'@' | b'*' | b'#' | b'?' | b'-' | b'$' | b'!') => {
                self.at += 1;
                Ok(true)
            }
            // `$[…]` is old arithmetic of bash's.
            Some(b'[') => Err(Unclear),
            _ => Ok(false),
        }
    }

    /// Passes over what is left of `(…)`.
    fn substitution(&mut self, depth: usize) -> Result<()> {
        if depth > DEPTH_MAX {
            return Err(Unclear);
        }
        let mut open = 1;
        let mut begins = true;
        loop {
            let byte = self.peek().ok_or(Unclear)?;
            match byte {
                b'(' => open += 1,
                b')' => open -= 1,
                // Lines of a document may hold anything.
                b'<' if self.ahead(1) == Some(b'<') => return Err(Unclear),
                b'#' if begins => {
                    self.comment();
                    continue;
                }
                b'\'' => {
                    self.at += 1;
                    while self.next().ok_or(Unclear)? != b'\'' {}
                    begins = false;
                    continue;
                }
                b'"' => {
                    self.at += 1;
                    self.in_quotes(&mut Word::nowhere(), depth + 1)?;
                    begins = false;
                    continue;
                }
                // Quotes of its own kind.
                b'$' if self.ahead(1) == Some(b'\'') => return Err(Unclear),
                b'$' | b'`' => {
                    self.expansion(depth + 1)?;
                    begins = false;
                    continue;
                }
                b'\\' => self.at += 1,
                _ => {}
            }
            begins = matches!(byte, b' ' | b'\t' | b'\n' | b';' | b'(' | b'&' | b'|');
            self.next().ok_or(Unclear)?;
            if open == 0 {
                return Ok(());
            }
        }
    }

    /// Passes over what is left of `${…}`.
    fn braces(&mut self, depth: usize) -> Result<()> {
        if depth > DEPTH_MAX {
            return Err(Unclear);
        }
        loop {
            match self.peek().ok_or(Unclear)? {
                b'}' => {
                    self.at += 1;
                    return Ok(());
                }
                b'"' => {
                    self.at += 1;
                    self.in_quotes(&mut Word::nowhere(), depth + 1)?;
                }
                // Whether these quote depends on what is around.
                b'\'' => return Err(Unclear),
                b'$' | b'`' => drop(self.expansion(depth + 1)?),
                b'\\' => {
                    self.at += 1;
                    self.next().ok_or(Unclear)?;
                }
                _ => drop(self.next()),
            }
        }
    }
}

/// The name in `$NAME`, `${NAME}`, and these between double quotes.
fn variable(raw: &[u8]) -> Option<String> {
    let raw = std::str::from_utf8(raw).ok()?;
    let inside = raw.strip_prefix('"').and_then(|raw| raw.strip_suffix('"'));
    let name = inside.unwrap_or(raw).strip_prefix('$')?;
    let braced = name
        .strip_prefix('{')
        .and_then(|name| name.strip_suffix('}'));
    let name = braced.unwrap_or(name);
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (!name.is_empty() && name.bytes().all(is_name)).then(|| name.to_owned())
}

impl Word {
    /// For what is only passed over.
    fn nowhere() -> Word {
        Word {
            start: Vec::new(),
            rest: Rest::AnyWords,
            bare: false,
            variable: None,
        }
    }

    fn push(&mut self, byte: u8) {
        if self.rest == Rest::Nothing {
            self.start.push(byte);
        }
    }

    fn some(&mut self, rest: Rest) {
        if self.rest != Rest::AnyWords {
            self.rest = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Each command as a line: where, how often, its words; `?` is a word, `*` any number of them.
    fn told(script: &str) -> String {
        let mut text = String::new();
        for command in commands(script.as_bytes()).0 {
            let runs = match command.runs {
                Runs::Once => "",
                Runs::Repeatedly => "+",
                Runs::Perhaps => "?",
            };
            text += &format!("{}{runs}", command.line);
            if !command.in_shell {
                text += "|";
            }
            text += ":";
            for word in &command.words {
                text.push(' ');
                text += &match (word.text(), word.is_one()) {
                    (Some(known), _) => known.to_string_lossy().replace(' ', "_"),
                    (None, true) => "?".into(),
                    (None, false) => "*".into(),
                };
            }
            if let Some(name) = &command.function {
                text += &format!(" {}()", name.display());
            }
            if command.writes {
                text += " >";
            }
            if command.opaque || !command.inside.is_empty() {
                text += " $";
            }
            text.push('\n');
        }
        text
    }

    fn check(script: &str, expected: &[&str]) {
        assert_eq!(told(script), expected.join("\n") + "\n", "{script}");
    }

    #[test]
    fn words() {
        check("a 'b c' \"d e\" f\\ g # h\n", &["1: a b_c d_e f_g"]);
        check("a \\\n  b\\\nc 'd\ne'\nf", &["1: a bc d\ne", "5: f"]);
        check(
            "a $B \"$B\" \"$@\" \"${B[@]}\" x${B:-c d}y $1 $ '$B'",
            &["1: a * ? * * * * $ $B"],
        );
        check(
            "a *.sif [ab] {1,2} {} x~ ~/a a=~/b b#c ''",
            &["1: a * * * {} x~ ? ? b#c "],
        );
        check("a $(b; c 'd)' \")\" (e)) f", &["1: a * f $"]);
        check(
            "a `b \\` c` \"$(d)\" $((1 + $X)) $((`e`))",
            &["1: a * ? * * $"],
        );
        check("a $((1 + 2)) f", &["1: a * f"]);
        check("A=1 B=$(x) c", &["1: A=1 * c $"]);
        check("A=(1 2 $(x)) B+=(y)", &["1: ? ? $"]);
    }

    #[test]
    fn redirections_and_documents_are_passed_over() {
        check("a >b 2>&1 <c &>d e >|f 3<>g", &["1: a e >"]);
        check(
            "a <<E 'b'\n$x ' \nE\nc <<-'F'\n\t$(d)\n\tF\ne <<<f g",
            &["1: a b", "4: c", "7: e g"],
        );
        check("a <<E\n$(b)\nE\nc", &["1: a $", "4: c"]);
        check("a <<E | b <<F\nx\nE\ny\nF\nc", &["1|: a", "1|: b", "6: c"]);
        check("a <(b c) > >(d)", &["1: a ? > $"]);
        check("a 2 b2>c", &["1: a 2 b2 >"]);
        // One that does not end.
        check("a\nb <<E\nc\n", &["1: a"]);
    }

    #[test]
    fn conditions_loops_and_functions() {
        check("a && b || c; d", &["1: a", "1?: b", "1?: c", "1: d"]);
        check(
            "a | b |& c\nd & e",
            &["1|: a", "1|: b", "1|: c", "2|: d", "2: e"],
        );
        check(
            "a |\n # x\n b &&\n c\nd",
            &["1|: a", "3|: b", "4?: c", "5: d"],
        );
        check(
            "if a; then b; elif c; then d; else e; fi; f",
            &["1?|: a", "1?|: b", "1?|: c", "1?|: d", "1?|: e", "1: f"],
        );
        check(
            "for x in 1 *; do a $x; done | b\nfor ((i=0; i<3; i++))\ndo c\ndone",
            &["1+|: a *", "1|: b", "3+|: c"],
        );
        check("for x in $(y); do a; done", &["1+|: $", "1+|: a"]);
        check(
            "while a; do b; done <c; until d; do e; done",
            &["1?|: a", "1?|: b", "1?|: d", "1?|: e"],
        );
        check(
            "( a; b ); { c; d; }; e",
            &["1|: a", "1|: b", "1|: c", "1|: d", "1: e"],
        );
        check("a && { b; c; }; d", &["1: a", "1?|: b", "1?|: c", "1: d"]);
        check(
            "f() { a; }\nfunction g { b; }\nfunction h ()\n(c)\nd",
            &[
                "1?: f()", "1?|: a", "2?: g()", "2?|: b", "3?: h()", "4?|: c", "5: d",
            ],
        );
        check(
            "a\ncase $x in\n(b) c;; [d]*|e) f <<E;;\n)\nE\nesac\ng",
            &["1: a", "2: $", "7: g"],
        );
        check(
            "[[ a < b && ( $c =~ ^(d|e)$ ) ]] && f; [ -f g ] || h; ((i++)); ! i",
            &["1?: f", "1: [ -f g ]", "1?: h", "1: i"],
        );
    }

    #[test]
    fn what_is_not_understood_ends_it() {
        for script in [
            "a\nb \"c\nd",
            "a\nb 'c",
            "a\nfi",
            "a\n}",
            "a\nb (c)",
            "a\nfi b\nc",
            "a\n$(b <<E\n)\nE\n)",
            "a\nesac",
            "a\nb ;; c",
            "a\nb $(c",
            "a\nb `c",
            "a\nb ${c",
            "a\nb\r\nc",
            "a\nb\0c",
            "a\n(b",
            "a\ncoproc b",
            "a\nfor x do y; done",
        ] {
            let told = told(script);
            assert!(told.starts_with("1: a\n"), "{script}: {told}");
            assert!(told == "1: a\n" || script == "a\n(b", "{script}: {told}");
        }
        // As deep as one likes.
        for part in ["\"$(", "${", "$(", "("] {
            assert!(commands(part.repeat(100_000).as_bytes()).0.is_empty());
        }
    }

    #[test]
    fn what_runs_inside() {
        let inside = |script: &str| {
            let (found, whole) = commands(script.as_bytes());
            let inside = found[0].inside.iter();
            let inside: Vec<_> = inside
                .map(|i| String::from_utf8_lossy(i).into_owned())
                .collect();
            (inside.join("|"), found[0].opaque, whole)
        };
        for (script, expected, opaque, whole) in [
            ("a $(b c) `d`", "b c|d", false, true),
            ("a \"$(b \"$(c)\")\"", "c|b \"$(c)\"", false, true),
            ("a $((1 + $(b)))", "b", false, true),
            ("a $((b) | c)", "(b) | c", false, true),
            ("a `b \\`c\\``", "b \\`c\\`", true, true),
            ("a <(b)", "", true, true),
            ("a; fi", "", false, false),
            ("a; if b; then c", "", false, false),
        ] {
            let expected = (expected.to_owned(), opaque, whole);
            assert_eq!(inside(script), expected, "{script}");
        }
    }

    #[test]
    fn variables() {
        let (found, _) = commands(b"$A ${A} \"$A\" \"${A}\" '$A' $A$A x$A $(A) ${A:-b}");
        let names: Vec<_> = found[0].words.iter().map(Word::variable).collect();
        let a = Some("A");
        assert_eq!(names, [a, a, a, a, None, None, None, None, None]);
    }

    #[test]
    fn assignments() {
        let name = |script: &str| {
            let (found, _) = commands(script.as_bytes());
            found[0].words[0].assigned().map(String::from)
        };
        assert_eq!(name("A_1=$(x)").as_deref(), Some("A_1"));
        assert_eq!(name("A+=x").as_deref(), Some("A"));
        for no in ["1A=x", "A-B=x", "=x", "$A=x", "A"] {
            assert_eq!(name(no), None, "{no}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2048))]
        #[test]
        fn nothing_panics_and_lines_are_in_order(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "a", " ", "\n", "'", "\"", "`", "$", "(", ")", "{", "}", "<<E", "E", "\\", "#", "|", "&",
                ";", "<", ">", "if ", "fi", "for ", " do ", "done", "case ", "esac", "[[", "]]", "=", "1",
            ]), 0..40)
        ) {
            let script = parts.concat();
            let (found, _) = commands(script.as_bytes());
            let last = script.matches('\n').count() + 1;
            prop_assert!(found.iter().all(|command| (1..=last).contains(&command.line)));
        }
    }
}
