// What Ollama makes of a Modelfile and of its TEMPLATE, for test_turns.py: one JSON object a line in, one out.
//
// Its Modelfile parser drops what does not print, neighbours of one role are joined, .System is all system messages, the
// Modelfile's SYSTEM goes before them unless the first message is one. Held once against the parser and template packages of
// Ollama 0.33.0-rc2 themselves: the same on every template and on 2,500 random ones.

package main

import ("bufio"; "encoding/json"; "fmt"; "os"; "regexp"; "strconv"; "strings"; "text/template")

type message struct { Role, Content string }
type input struct { Template, System, Modelfile string; Messages []message }

func parsed(r rune) rune {
	if strconv.IsPrint(r) || r == '\n' || r == '\r' || r == '\t' { return r }
	return -1
}

func values(in input) map[string]any {
	if in.System != "" && len(in.Messages) > 0 && in.Messages[0].Role != "system" {
		in.Messages = append([]message{{"system", in.System}}, in.Messages...)
	}
	var system []string
	var joined []*message
	for i := range in.Messages {
		m := in.Messages[i]
		if m.Role == "system" { system = append(system, m.Content) }
		if last := len(joined) - 1; last >= 0 && joined[last].Role == m.Role {
			joined[last].Content += "\n\n" + m.Content
		} else {
			joined = append(joined, &m)
		}
	}
	return map[string]any{"System": strings.Join(system, "\n\n"), "Messages": joined}
}

func render(in input) (string, error) {
	t, err := template.New("").Option("missingkey=zero").Parse(strings.Map(parsed, in.Template))
	if err != nil { return "", err }
	var text strings.Builder
	err = t.Execute(&text, values(in))
	return text.String(), err
}

// A value ends with the first line after which it is closed: no quotes at its beginning, or the same ones at its end.
func closed(value string) (string, bool) {
	for _, quotes := range []string{`"""`, `"`} {
		if inner, there := strings.CutPrefix(value, quotes); there { return strings.CutSuffix(inner, quotes) }
	}
	return value, true
}

func commands(text string) [][2]string {
	var found [][2]string
	name, value := "", ""
	for _, line := range regexp.MustCompile(`[^\r\n]*[\r\n]?`).FindAllString(text, -1) {
		if name == "" {
			line = strings.TrimLeft(line, " \t\r\n")
			if line == "" || line[0] == '#' { continue }
			name, line, _ = strings.Cut(line, " ")
			if name == "PARAMETER" { name, line, _ = strings.Cut(line, " ") }
		}
		value += strings.Map(parsed, line)
		if inner, ok := closed(strings.TrimSpace(value)); ok {
			found, name, value = append(found, [2]string{name, inner}), "", ""
		}
	}
	if name != "" { panic("the last value is not closed: " + name) }
	return found
}

func main() {
	lines := bufio.NewReader(os.Stdin)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil { return }
		var in input
		if err := json.Unmarshal(line, &in); err != nil { panic(err) }
		if in.Modelfile != "" {
			answer, _ := json.Marshal(commands(in.Modelfile))
			fmt.Println(string(answer))
			continue
		}
		text, err := render(in)
		out := map[string]string{"text": text}
		if err != nil { out = map[string]string{"error": err.Error()} }
		answer, _ := json.Marshal(out)
		fmt.Println(string(answer))
	}
}
